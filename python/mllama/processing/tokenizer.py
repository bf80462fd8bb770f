"""Meta's own `tokenizer.model` of Llama 3.x: byte-pair encoding with tiktoken, with Meta's pattern
and special tokens.
"""

import base64
import operator
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

# Meta's published pattern, which splits text into pieces that are encoded separately.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_NAMED = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|reserved_special_token_0|>",
    "<|reserved_special_token_1|>",
    "<|finetune_right_pad_id|>",
    "<|step_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eom_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
    "<|image|>",
)
# In the order of their ids, which follow the file's.
SPECIAL_TOKENS = (
    *_NAMED,
    *(f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(_NAMED))),
)

# Meta's class encodes long texts in parts, because the regex engine fails on very long ones. The
# boundaries affect the ids.
_LONGEST_PART, _LONGEST_RUN = 400_000, 25_000


class Tokenizer:
    """Text to token ids and back, equal to Meta's class. Needs tiktoken: `pip install
    'mllama[convert]'`.

    Attributes:
        model: the `tiktoken.Encoding`.
        special: {name: id} of the 256 special tokens, `<|begin_of_text|>` first.
        n_words: number of ids.
        bos_id, eos_id, pad_id: ids of `<|begin_of_text|>`, `<|end_of_text|>` and
            `<|finetune_right_pad_id|>`.
    """

    def __init__(self, model_path: str | os.PathLike):
        """
        Args:
            model_path: a `tokenizer.model` of Llama 3.x.

        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is not a list of byte-pair ranks.
            ImportError: tiktoken is not installed.
        """
        ranks = read_ranks(Path(model_path))
        try:
            import tiktoken
        except ImportError as error:
            raise ImportError(
                "Meta's tokenizer.model needs tiktoken: pip install 'mllama[convert]'"
            ) from error
        self.special = {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)}
        self.model = tiktoken.Encoding(
            Path(model_path).name,
            pat_str=PATTERN,
            mergeable_ranks=ranks,
            special_tokens=self.special,
            explicit_n_vocab=len(ranks) + 256,
        )
        self.n_words = self.model.n_vocab
        self.bos_id = self.special["<|begin_of_text|>"]
        self.eos_id = self.special["<|end_of_text|>"]
        self.pad_id = self.special["<|finetune_right_pad_id|>"]

    def encode(
        self, text: str, bos: bool = False, eos: bool = False, allowed_special: Collection[str] = ()
    ) -> list[int]:
        """Token ids of a text.

        Args:
            text: a text of any length. Names of special tokens in it are plain text, because a
                prompt may come from anyone.
            bos: prepend `<|begin_of_text|>`.
            eos: append `<|end_of_text|>`.
            allowed_special: special tokens whose names in the text become these tokens; "all"
                allows all of them.

        Raises:
            TypeError: text is not a string, or allowed_special not a collection of names.
            ValueError: allowed_special contains an unknown name.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a string, got {type(text).__name__}")
        if not isinstance(allowed_special, Collection):
            raise TypeError(
                "allowed_special must be a collection of names or 'all', got "
                f"{type(allowed_special).__name__}"
            )
        allowed = set(self.special) if allowed_special == "all" else set(allowed_special)
        if unknown := sorted(allowed - self.special.keys()):
            raise ValueError(
                f"allowed_special names no special tokens: {', '.join(map(repr, unknown[:5]))}"
            )
        ids = [self.bos_id] if bos else []
        for part in _parts(text):
            ids += self.model.encode(part, allowed_special=allowed, disallowed_special=())
        if eos:
            ids.append(self.eos_id)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, with special tokens by name. Invalid UTF-8 becomes U+FFFD.

        Args:
            ids: integers, also as a one-dimensional tensor.

        Raises:
            TypeError: ids is not a sequence of integers.
            IndexError: an id is out of range.
        """
        try:
            numbers = [operator.index(token) for token in ids]
        except TypeError as error:
            raise TypeError(f"ids must be a sequence of whole numbers: {error}") from error
        for token in numbers:
            if not 0 <= token < self.n_words:
                raise IndexError(f"ids: {token} is not between 0 and {self.n_words - 1}")
        return self.model.decode(numbers)


def read_ranks(path: Path) -> dict[bytes, int]:
    """{token: rank} of a tiktoken file, which has one line of base64 and a number per token.

    tiktoken's own reader caches a copy in the temporary folder by path, and would return it after
    the file has changed.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: a line is malformed, a rank is missing or repeated, or a single byte has no
            rank (tiktoken would panic).
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no tokenizer file {path}")
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except ValueError as error:
            raise ValueError(
                f"{path} is not Meta's tokenizer.model of Llama 3: line {number} is no base64 "
                "token and its rank"
            ) from error
    missing = 256 - sum(bytes([byte]) in ranks for byte in range(256))
    if missing or b"" in ranks or set(ranks.values()) != set(range(len(ranks))):
        reason = (
            f"{missing} of the 256 single bytes are missing"
            if missing
            else "its ranks are not the numbers from 0 without a gap"
        )
        raise ValueError(f"{path} is not Meta's tokenizer.model of Llama 3: {reason}")
    return ranks


def _parts(text: str) -> Iterable[str]:
    """The text split where Meta's class splits it: every 400,000 characters, and in runs of more
    than 25,000 spaces or non-spaces.
    """
    for start in range(0, len(text), _LONGEST_PART):
        part = text[start : start + _LONGEST_PART]
        begin = 0
        for run in re.finditer(r"\s+|\S+", part):
            for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
                yield part[begin:cut]
                begin = cut
        yield part[begin:]
