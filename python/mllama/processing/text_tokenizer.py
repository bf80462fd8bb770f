"""A model's tokenizer, without transformers: the tokenizers library's, with named special tokens
and a chat template.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Tokenizer, decoders, normalizers, pre_tokenizers

from mllama.processing.folders import TOKENIZER_FILES, read_object

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_ENDS = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
# Defaults of transformers' classes for tokens that a folder does not name.
_DEFAULTS = {
    "LlamaTokenizer": _ENDS,
    "GemmaTokenizer": {
        name: f"<{name.removesuffix('_token')}>"
        for name in ("unk_token", "bos_token", "eos_token", "pad_token", "mask_token")
    },
}
_CLASS_OF_MODEL = dict.fromkeys(("gemma", "gemma2", "gemma3", "gemma3_text"), "GemmaTokenizer")


class TextTokenizer:
    """Text to token ids and back.

    Attributes:
        backend: the `tokenizers.Tokenizer`.
        special_tokens_map: {name: token} of the named special tokens (bos_token, eos_token ...).
        chat_template: a Jinja template, several by name, or None.
        bos_token, eos_token, pad_token, bos_token_id, eos_token_id, pad_token_id: None if there is
            no such token.
    """

    def __init__(
        self,
        backend: Tokenizer,
        named: Mapping[str, str | AddedToken | None] | None = None,
        chat_template: str | Mapping[str, str] | None = None,
        extra: Iterable[str | AddedToken] = (),
    ):
        """
        Args:
            backend: modified: truncation and padding are turned off, missing special tokens are
                added.
            named: special tokens by name; None values are ignored.
            chat_template: see the attribute.
            extra: special tokens without a name.
        """
        backend.no_truncation()
        backend.no_padding()
        self.backend, self.chat_template = backend, chat_template
        named = {name: token for name, token in (named or {}).items() if token is not None}
        self.special_tokens_map = {name: str_of(token) for name, token in named.items()}
        self.add_special_tokens([*named.values(), *extra])

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    @property
    def bos_token(self) -> str | None:
        return self.special_tokens_map.get("bos_token")

    @property
    def eos_token(self) -> str | None:
        return self.special_tokens_map.get("eos_token")

    @property
    def pad_token(self) -> str | None:
        return self.special_tokens_map.get("pad_token")

    @property
    def bos_token_id(self) -> int | None:
        return self.token_id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        return self.token_id(self.eos_token)

    @property
    def pad_token_id(self) -> int | None:
        return self.token_id(self.pad_token)

    def token_id(self, token: str | None) -> int | None:
        """The id of a token; None if it is not in the vocabulary."""
        return None if token is None else self.backend.token_to_id(token)

    def add_special_tokens(self, tokens: Iterable[str | AddedToken]) -> None:
        """Add missing special tokens. They are recognized in any text, and skipped by
        `decode(skip_special_tokens=True)`.
        """
        there = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        for token in tokens:
            if str_of(token) not in there:
                there.add(str_of(token))
                if isinstance(token, str):
                    token = AddedToken(token, special=True, normalized=False)
                self.backend.add_special_tokens([token])

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text. Names of special tokens in it become these tokens.

        Args:
            text: a text of any length.
            add_special_tokens: add the tokens that the tokenizer puts around every text (BOS).
        """
        return self.backend.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(
        self, ids: int | Iterable[int] | torch.Tensor, skip_special_tokens: bool = False
    ) -> str:
        """The text of token ids, given as a list or a tensor [tokens]."""
        if isinstance(ids, torch.Tensor):
            ids = ids.tolist()
        ids = [ids] if isinstance(ids, int) else list(ids)
        return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def pad(
        self, rows: Sequence[Sequence[int]], side: str = "left", pad_token_id: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Pad token ids to a batch.

        Args:
            rows: one list of ids per text.
            side: "left" or "right".
            pad_token_id: fills the rows. Default: the padding token's id, or 0 if there is none.

        Returns:
            input_ids and attention_mask [rows, longest] int64.
        """
        if pad_token_id is None:
            pad_token_id = self.pad_token_id or 0
        return pad_rows(rows, side, pad_token_id)


def pad_rows(
    rows: Sequence[Sequence[int]], side: str = "left", pad_token_id: int = 0
) -> dict[str, torch.Tensor]:
    """`TextTokenizer.pad` for any tokenizer's ids.

    Raises:
        ValueError: side is neither "left" nor "right".
    """
    if side not in ("left", "right"):
        raise ValueError(f"side must be 'left' or 'right', got {side!r}")
    longest = max(map(len, rows))
    size = (len(rows), longest)
    ids = torch.full(size, pad_token_id, dtype=torch.int64, device="cpu")
    mask = torch.zeros(size, dtype=torch.int64, device="cpu")
    for number, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[number, place] = torch.tensor(row, dtype=torch.int64, device="cpu")
        mask[number, place] = 1
    return {"input_ids": ids, "attention_mask": mask}


def load_tokenizer(where: str | os.PathLike) -> TextTokenizer:
    """Read a folder's tokenizer.json with the settings in tokenizer_config.json,
    special_tokens_map.json, added_tokens.json and chat_template.jinja, as transformers 5 does.

    Raises:
        FileNotFoundError: the folder has no tokenizer.
        ValueError: a file cannot be read, or the tokenizer is of another kind (the message names
            it), which transformers can convert.
    """
    folder = Path(where)
    file = folder / "tokenizer.json"
    if not file.exists():
        others = [name for name in TOKENIZER_FILES if (folder / name).exists()]
        if not others:
            raise FileNotFoundError(
                f"{folder} holds no tokenizer: none of {', '.join(TOKENIZER_FILES)}"
            )
        raise ValueError(
            f"{folder / others[0]} cannot be read without transformers, only tokenizer.json can; "
            "transformers'"
            " AutoTokenizer.from_pretrained(...).save_pretrained(...) writes one"
        )
    settings = read_object(folder, "tokenizer_config.json")
    try:
        backend = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises no narrower type
        raise ValueError(f"{file}: the tokenizer cannot be read: {str(error)[:200]}") from error
    try:
        _check_settings(settings, backend)
        return _with_settings(folder, backend, settings)
    except (TypeError, AttributeError, KeyError) as error:
        raise ValueError(f"{folder}: tokenizer_config.json cannot be read: {error!r}") from error


def _check_settings(settings: dict, backend: Tokenizer) -> None:
    if settings.get("fast_tokenizer_files"):
        raise ValueError("fast_tokenizer_files is not supported: only tokenizer.json is read")
    bpe = type(backend.model).__name__ == "BPE"
    corrupt = "clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output"
    if settings.get("clean_up_tokenization_spaces") and (not bpe or settings.get(corrupt)):
        raise ValueError("clean_up_tokenization_spaces is not supported")


def _with_settings(folder: Path, backend: Tokenizer, settings: dict) -> TextTokenizer:
    kind = _tokenizer_class(folder, settings, backend)
    padding = (backend.padding or {}).get("pad_token")
    backend.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    known = {"pad_token": padding, **_DEFAULTS.get(kind, {}), **settings}
    added = {int(place): as_token(token) for place, token in _added(folder, settings).items()}
    if "added_tokens_decoder" not in settings:
        known |= read_object(folder, "special_tokens_map.json")
    if kind == "LlamaTokenizer":
        _as_llama(backend, settings)
    if kind == "GemmaTokenizer":
        _as_gemma(backend)
    there = {token.content for token in backend.get_added_tokens_decoder().values()}
    backend.add_tokens(
        [added[place] for place in sorted(added) if added[place].content not in there]
    )
    extra = known.get("extra_special_tokens") or known.get("additional_special_tokens") or []
    own = {
        name: token
        for name, token in known.items()
        if name.endswith("_token") and name not in NAMED and isinstance(token, (str, dict))
    }
    if isinstance(extra, dict):
        own, extra = own | extra, []
    named = {name: known.get(name) for name in NAMED} | own
    return TextTokenizer(
        backend,
        {name: as_token(token) for name, token in named.items()},
        _chat_template(folder, settings),
        map(as_token, extra),
    )


def _added(folder: Path, settings: dict) -> dict:
    """Tokens by id that other files add to those of tokenizer.json."""
    if "added_tokens_decoder" in settings:
        return settings["added_tokens_decoder"]
    older = read_object(folder, "added_tokens.json")
    return {place: {"content": token} for token, place in older.items()}


def as_token(token: Any) -> Any:
    """A token as it is written in files: a text, or a dict with its flags."""
    if not isinstance(token, dict):
        return token
    return AddedToken(**{name: value for name, value in token.items() if name != "__type"})


def str_of(token: str | AddedToken) -> str:
    """A token's text."""
    return token if isinstance(token, str) else token.content


def _chat_template(folder: Path, settings: dict) -> str | dict[str, str] | None:
    """The templates in their own files, or those in tokenizer_config.json."""
    files = {path.stem: path for path in sorted(folder.glob("additional_chat_templates/*.jinja"))}
    if (folder / "chat_template.jinja").exists():
        files["default"] = folder / "chat_template.jinja"
    found = {name: path.read_text(encoding="utf-8") for name, path in files.items()}
    if found:
        return found["default"] if list(found) == ["default"] else found
    template = settings.get("chat_template")
    if isinstance(template, list):
        return {entry["name"]: entry["template"] for entry in template}
    return template


def _tokenizer_class(folder: Path, settings: dict, backend: Tokenizer) -> str:
    """transformers' class for a folder's tokenizer, without "Fast"."""
    config = read_object(folder, "config.json")
    class_name = settings.get("tokenizer_class") or config.get("tokenizer_class")
    kind = str(class_name or _CLASS_OF_MODEL.get(str(config.get("model_type")), "")).removesuffix(
        "Fast"
    )
    byte_level = any(
        part and b"ByteLevel" in part.__getstate__()
        for part in (backend.pre_tokenizer, backend.decoder)
    )
    if config.get("model_type") == "llava" or (kind == "LlamaTokenizer" and byte_level):
        return "TokenizersBackend"  # unchanged: folders of Llama 3 and LLaVA name a wrong class
    return kind


def _as_llama(backend: Tokenizer, settings: dict) -> None:
    """Replace the file's pipeline by that of transformers' LlamaTokenizer."""
    prefix = settings.get("add_prefix_space")
    prefix = True if prefix is None else bool(prefix)
    scheme = "never" if not prefix else "always" if settings.get("legacy", False) else "first"
    backend.normalizer = None
    backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", scheme, split=False)
    steps = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence(steps + [decoders.Strip(" ", 1, 0)] * prefix)


def _as_gemma(backend: Tokenizer) -> None:
    """As `_as_llama`, of GemmaTokenizer."""
    backend.normalizer = normalizers.Replace(" ", "\u2581")
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
