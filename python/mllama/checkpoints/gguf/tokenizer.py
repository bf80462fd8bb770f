"""Reads the tokenizer of a GGUF file, and writes a tokenizer into one.

There are two kinds: `gpt2`, byte-level BPE with a named pre-tokenizer (`tokenizer.ggml.pre`), and
`llama`, SentencePiece's BPE with a score per token. transformers' conversion supports neither
SmolLM's pre-tokenizer nor Llama 3's rule that a word which is a token is not split. So both are
built here from parts of the tokenizers library, as llama.cpp reads them.
"""

import json
import os
import re
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    normalizers,
    pre_tokenizers,
    processors,
)
from tokenizers.models import BPE

from mllama.checkpoints.gguf.header import GgufHeader, gguf

_SPACE = "\u2581"  # SentencePiece's space
_TOKEN_MAX = 512  # characters per token; merges are found by trying every split of it
_BYTE = re.compile("<0x[0-9A-F]{2}>")
_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Split by one regular expression after the other, then into bytes."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence(
        [*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )


# llama.cpp's names (llama-vocab.cpp); the first of several spellings is written.
_PRE = {
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "llama-v3": _split(_LLAMA3),
    "smollm": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    ),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "default": _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_WHOLE_WORDS = (
    "llama-bpe",
    "llama3",
    "llama-v3",
)  # a word that is a token is not split, and BOS is added


class GgufTokenizer(NamedTuple):
    """A tokenizer, its named special tokens (bos_token ...) and its chat template or None: the
    arguments of `mllama.processing.text_tokenizer.TextTokenizer`.
    """

    backend: Tokenizer
    named: dict[str, AddedToken]
    chat_template: str | None


def read_tokenizer(path: str | os.PathLike) -> GgufTokenizer:
    """Read the tokenizer of a GGUF file.

    Control tokens are special; user-defined tokens are found in any text but are not special. BOS
    and EOS are added as the file says, by default as in llama.cpp.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a valid GGUF file, or its tokenizer is of another kind.
    """
    header = GgufHeader(path)
    tokens, kinds = (
        header.get("tokenizer.ggml.tokens", list),
        header.get("tokenizer.ggml.token_type", list, []),
    )
    kinds = kinds or [gguf.TokenType.NORMAL] * len(tokens)
    if (
        len(kinds) != len(tokens)
        or len(set(tokens)) != len(tokens)
        or not all(isinstance(token, str) for token in tokens)
    ):
        raise ValueError(
            f"{path}: tokenizer.ggml.tokens must be distinct texts, with one "
            "tokenizer.ggml.token_type each"
        )
    if (longest := max(map(len, tokens), default=0)) > _TOKEN_MAX:
        raise ValueError(f"{path}: a token has {longest} characters; at most {_TOKEN_MAX} are read")
    model = header.get("tokenizer.ggml.model", str)
    if model not in ("gpt2", "llama"):
        raise ValueError(
            f"{path}: tokenizer.ggml.model {model[:50]!r} is not read; 'gpt2' and 'llama' are"
        )
    named = {f"{name}_token": _token(header, tokens, key) for name, key in _KEYS.items()}
    try:
        backend = (_byte_level if model == "gpt2" else _sentencepiece)(
            header, tokens, kinds, named["unk_token"]
        )
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises no narrower one, for merges that are none
        raise ValueError(f"{path}: the tokenizer cannot be: {str(error)[:200]}") from error
    added = [
        (token, kind)
        for token, kind in zip(tokens, kinds, strict=True)
        if kind in (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    ]
    backend.add_special_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in added
            if kind == gguf.TokenType.CONTROL
        ]
    )
    backend.add_tokens(
        [
            AddedToken(token, normalized=False)
            for token, kind in added
            if kind == gguf.TokenType.USER_DEFINED
        ]
    )
    add_bos = header.get(
        "tokenizer.ggml.add_bos_token", bool, model == "llama" or _pre(header) in _WHOLE_WORDS
    )
    add_eos = header.get("tokenizer.ggml.add_eos_token", bool, False)
    _add_ends(backend, add_bos and named["bos_token"], add_eos and named["eos_token"])
    return GgufTokenizer(
        backend,
        {
            name: AddedToken(token, normalized=False, special=True)
            for name, token in named.items()
            if token is not None
        },
        header.get("tokenizer.chat_template", str, "") or None,
    )


def _add_ends(backend: Tokenizer, bos: str | None, eos: str | None) -> None:
    """Make a tokenizer add BOS before and EOS after every text."""
    single = " ".join(part for part in (bos, "$A", eos) if part)
    ends = [(token, backend.token_to_id(token)) for token in {bos or eos, eos or bos} if token]
    backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)


def _token(header: GgufHeader, tokens: list[str], key: str) -> str | None:
    place = header.get(f"tokenizer.ggml.{key}_token_id", int, -1)
    if place >= len(tokens):
        raise ValueError(
            f"{header.path}: tokenizer.ggml.{key}_token_id is {place}, there are {len(tokens)} "
            "tokens"
        )
    return tokens[place] if place >= 0 else None


def _pre(header: GgufHeader) -> str:
    return header.get("tokenizer.ggml.pre", str, "default")


def _byte_level(
    header: GgufHeader, tokens: list[str], kinds: list[int], unknown: str | None
) -> Tokenizer:
    pre = _pre(header)
    if pre not in _PRE:
        raise ValueError(
            f"{header.path}: tokenizer.ggml.pre {pre[:50]!r} is not read; {', '.join(_PRE)} are"
        )
    merges = [tuple(merge.split(" ", 1)) for merge in header.get("tokenizer.ggml.merges", list, [])]
    backend = Tokenizer(
        BPE(
            {token: place for place, token in enumerate(tokens)},
            merges,
            ignore_merges=pre in _WHOLE_WORDS,
        )
    )
    backend.pre_tokenizer, backend.decoder = _PRE[pre], decoders.ByteLevel()
    return backend


def _sentencepiece(
    header: GgufHeader, tokens: list[str], kinds: list[int], unknown: str | None
) -> Tokenizer:
    scores = header.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise ValueError(
            f"{header.path}: {len(scores)} tokenizer.ggml.scores for {len(tokens)} tokens"
        )
    whole = {
        token for token, kind in zip(tokens, kinds, strict=True) if kind != gguf.TokenType.NORMAL
    }
    vocabulary = {token: place for place, token in enumerate(tokens)}
    merges = _merges(vocabulary, dict(zip(tokens, scores, strict=True)), whole)
    backend = Tokenizer(
        BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.get("tokenizer.ggml.add_space_prefix", bool, True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend


def _merges(
    vocabulary: dict[str, int], scores: dict[str, float], whole: set[str]
) -> list[tuple[str, str]]:
    """The merges of tokens with scores: every split of a token into two others, highest score
    first.
    """
    merges = []
    for token, score in scores.items():
        if token in whole:
            continue
        cuts = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        pairs = [
            pair for pair in cuts if all(part in vocabulary and part not in whole for part in pair)
        ]
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(score, len(left), len(right), left, right) for left, right in pairs]
    merges.sort(key=lambda merge: merge[:3], reverse=True)
    return [merge[3:] for merge in merges]


def add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Any, vocabulary: int) -> None:
    """Write a tokenizer into the metadata of a GGUF file.

    SentencePiece's merges are encoded as a score per token, earlier merges higher. For tokenizers
    that come from SentencePiece this is complete.

    Args:
        writer: the file's writer.
        tokenizer: a `TextTokenizer`, or a fast tokenizer of transformers, with a BPE model.
        vocabulary: rows of the model's embedding matrix; ids without a token become unused tokens.

    Raises:
        TypeError: tokenizer is of another type.
        ValueError: it has another model than BPE, or more tokens than the model.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None) or getattr(tokenizer, "backend", None)
    if not isinstance(backend, Tokenizer):
        raise TypeError(f"tokenizer must be a fast tokenizer, got {type(tokenizer).__name__}")
    state = json.loads(backend.to_str())
    model = state["model"]
    places = {place: token for token, place in backend.get_vocab().items()}
    if model["type"] != "BPE":
        raise ValueError(
            f"a tokenizer whose model is {model['type']} cannot be written as GGUF; BPE can"
        )
    if max(places, default=-1) >= vocabulary:
        raise ValueError(
            f"the tokenizer has the id {max(places)}, the model an embedding matrix of "
            f"{vocabulary} rows"
        )
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    sentencepiece = model["byte_fallback"]
    added = {entry["id"]: entry for entry in state["added_tokens"]}
    tokens, kinds = [], []
    for place in range(vocabulary):
        token, kind = places.get(place), gguf.TokenType.NORMAL
        if token is None:
            token, kind = f"[PAD{place}]", gguf.TokenType.UNUSED
        elif sentencepiece and token == model["unk_token"]:
            kind = gguf.TokenType.UNKNOWN
        elif place in added:
            kind = (
                gguf.TokenType.CONTROL if added[place]["special"] else gguf.TokenType.USER_DEFINED
            )
            if kind == gguf.TokenType.USER_DEFINED:  # matched in unnormalized text
                token = token.replace(_SPACE, " ")
        elif sentencepiece and _BYTE.fullmatch(token):
            kind = gguf.TokenType.BYTE
        tokens.append(token)
        kinds.append(int(kind))
    plain, whole = tokenizer.encode("a", add_special_tokens=False), tokenizer.encode("a")
    writer.add_tokenizer_model("llama" if sentencepiece else "gpt2")
    writer.add_tokenizer_pre("default" if sentencepiece else _pre_name(state))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    if sentencepiece:
        made = {
            merge.replace(" ", ""): -float(place)
            for place, merge in reversed(list(enumerate(merges)))
        }
        writer.add_token_scores([made.get(token, -float(len(merges))) for token in tokens])
        writer.add_add_space_prefix(backend.id_to_token(plain[0]).startswith(_SPACE))
    else:
        writer.add_token_merges(merges)
    for name, key in _KEYS.items():
        token = tokenizer.special_tokens_map.get(f"{name}_token")
        if token is not None and (place := backend.token_to_id(token)) is not None:
            writer.add_uint32(f"tokenizer.ggml.{key}_token_id", place)
    writer.add_add_bos_token(whole[0] != plain[0] and whole[0] == tokenizer.bos_token_id)
    writer.add_add_eos_token(whole[-1] != plain[-1] and whole[-1] == tokenizer.eos_token_id)
    if tokenizer.chat_template:
        template = tokenizer.chat_template
        if isinstance(template, dict):
            template = [{"name": name, "template": text} for name, text in template.items()]
        writer.add_chat_template(template)


def _pre_name(state: dict[str, Any]) -> str:
    """llama.cpp's name for a pre-tokenizer, from a tokenizer's state.

    Raises:
        ValueError: there is none.
    """
    found = _without_offsets(state["pre_tokenizer"])
    for name, known in _PRE.items():
        backend = Tokenizer(BPE())
        backend.pre_tokenizer = known
        if (
            state["normalizer"] is None
            and _without_offsets(json.loads(backend.to_str())["pre_tokenizer"]) == found
        ):
            return name
    description = (
        f"its pre-tokenizer is {str(found)[:200]}, its normalizer {str(state['normalizer'])[:100]}"
    )
    raise ValueError(
        f"the tokenizer cannot be written as GGUF: {description}; supported byte-level ones are "
        f"{', '.join(_PRE)}"
    )


def _without_offsets(part: Any) -> Any:
    """A tokenizer's part without fields that affect offsets only."""
    if isinstance(part, dict):
        return {
            name: _without_offsets(value) for name, value in part.items() if name != "trim_offsets"
        }
    return [_without_offsets(value) for value in part] if isinstance(part, list) else part
