"""Meta's own `tokenizer.model` of Llama 3.x: byte-pair encoding by tiktoken, with Meta's pattern
and special tokens.
"""

import base64
import operator
import os
import re
from collections.abc import Collection, Iterable
from pathlib import Path

# Meta's published pattern, which cuts text into the pieces that are encoded by themselves.
PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
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
# In the order of their ids, which follow those of the file.
SPECIAL_TOKENS = (
    *_NAMED,
    *(f"<|reserved_special_token_{2 + i}|>" for i in range(256 - len(_NAMED))),
)

# Meta's class encodes text in parts, because the pattern's engine gives up on very long ones. Its
# cuts are part of the ids.
_LONGEST_PART, _LONGEST_RUN = 400_000, 25_000


class Tokenizer:
    """Text to token ids and back, equal to Meta's class. Needs tiktoken: `pip install
    'mllama[convert]'`.

    Attributes:
        model: the `tiktoken.Encoding`.
        special: {name: id} of the 256 special tokens, `<|begin_of_text|>` first.
        n_words: how many ids there are.
        bos_id, eos_id, pad_id: of `<|begin_of_text|>`, `<|end_of_text|>` and
            `<|finetune_right_pad_id|>`.
    """

    def __init__(self, model_path: str | os.PathLike):
        """
        Args:
            model_path: a `tokenizer.model` of Llama 3.x.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is no list of byte-pair ranks.
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
            text: of any length. Special tokens' names in it are plain text, since a prompt may come
                from anyone.
            bos: put `<|begin_of_text|>` first.
            eos: put `<|end_of_text|>` last.
            allowed_special: special tokens whose names in the text mean the tokens; "all" is all of
                them.

        Raises:
            TypeError: `text` is no string, `allowed_special` no collection of names.
            ValueError: `allowed_special` names something else.
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
        """The text of token ids, special tokens by their names. Bytes that are no UTF-8 become
        U+FFFD.

        Args:
            ids: whole numbers, also as a one-dimensional tensor.

        Raises:
            TypeError: `ids` is no sequence of whole numbers.
            IndexError: an id is not one of the tokenizer's.
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
    """{token: rank} of a tiktoken file, which has a line of base64 and a number for each.

    tiktoken's own reader keeps a copy in the temporary folder for each path, and would read that
    when the file has changed.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is something else, a rank is missing or comes twice, or a single byte has
            none (tiktoken would panic on it).
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
    """The text cut where Meta's class cuts it: every 400,000 characters, and in runs of more than
    25,000 that are or are not spaces.
    """
    for start in range(0, len(text), _LONGEST_PART):
        part = text[start : start + _LONGEST_PART]
        begin = 0
        for run in re.finditer(r"\s+|\S+", part):
            for cut in range(run.start() + _LONGEST_RUN, run.end(), _LONGEST_RUN):
                yield part[begin:cut]
                begin = cut
        yield part[begin:]
