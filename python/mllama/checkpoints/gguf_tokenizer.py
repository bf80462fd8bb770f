"""The tokenizer of a GGUF file, and a tokenizer as a GGUF file has it.

Two kinds: `gpt2`, byte-level BPE with a pre-tokenizer that has a name (`tokenizer.ggml.pre`), and `llama`, SentencePiece's BPE with a score
for each token. Transformers' own conversion does not know the pre-tokenizer of SmolLM, nor that Llama 3 takes a word that is a token
without merging; so both are put together here, from the parts of the tokenizers library, as llama.cpp reads them.
"""

import os

from gguf import TokenType
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from transformers.tokenization_utils_base import generate_merges

from mllama.checkpoints.gguf_header import GgufHeader

_SPACE = "\u2581"  # SentencePiece's space
_TOKEN_MAX = 512  # characters of one token; its merges are found by trying every cut of it
_KEYS = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _split(*patterns: str) -> pre_tokenizers.PreTokenizer:
    """Cuts by one regular expression after the other, then bytes."""
    cuts = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
    return pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# llama.cpp's names, as its llama-vocab.cpp has them; the first of several spellings is written.
_PRE = {
    "llama-bpe": _split(_LLAMA3),
    "llama3": _split(_LLAMA3),
    "llama-v3": _split(_LLAMA3),
    "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]),
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "default": _split(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]"),
}
_WHOLE_WORDS = ("llama-bpe", "llama3", "llama-v3")  # a word that is a token is taken whole, and BOS is added


def load_tokenizer(path: str | os.PathLike) -> PreTrainedTokenizerFast:
    """The tokenizer inside a GGUF file, with its special tokens and its chat template.

    Control tokens are special; tokens of the user are found in any text, and are not. BOS and EOS are added as the file says, and as
    llama.cpp does where it says nothing. Templates are rendered by transformers, in jinja2's immutable sandbox.

    Raises:
        FileNotFoundError: no such file.
        ValueError: it is none, a broken one, or has a tokenizer of another kind.
    """
    header = GgufHeader(path)
    tokens, kinds = header.get("tokenizer.ggml.tokens", list), header.get("tokenizer.ggml.token_type", list, [])
    kinds = kinds or [TokenType.NORMAL] * len(tokens)
    if len(kinds) != len(tokens) or len(set(tokens)) != len(tokens) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{path}: tokenizer.ggml.tokens must be distinct texts, with one tokenizer.ggml.token_type each")
    if (longest := max(map(len, tokens), default=0)) > _TOKEN_MAX:
        raise ValueError(f"{path}: a token has {longest} characters; at most {_TOKEN_MAX} are read")
    model = header.get("tokenizer.ggml.model", str)
    if model not in ("gpt2", "llama"):
        raise ValueError(f"{path}: a tokenizer.ggml.model {model[:50]!r} is not read; 'gpt2' and 'llama' are")
    named = {f"{name}_token": _token(header, tokens, key) for name, key in _KEYS.items()}
    try:
        backend = (_byte_level if model == "gpt2" else _sentencepiece)(header, tokens, kinds, named["unk_token"])
    except ValueError:
        raise
    except Exception as error:  # tokenizers raises no narrower one, for merges that are none
        raise ValueError(f"{path}: the tokenizer cannot be: {str(error)[:200]}") from error
    added = [(token, kind) for token, kind in zip(tokens, kinds, strict=True) if kind in (TokenType.CONTROL, TokenType.USER_DEFINED)]
    backend.add_special_tokens([AddedToken(token, normalized=False) for token, kind in added if kind == TokenType.CONTROL])
    backend.add_tokens([AddedToken(token, normalized=False) for token, kind in added if kind == TokenType.USER_DEFINED])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **{name: AddedToken(token, normalized=False, special=True) for name, token in named.items() if token is not None},
        add_bos_token=header.get("tokenizer.ggml.add_bos_token", bool, model == "llama" or _pre(header) in _WHOLE_WORDS),
        add_eos_token=header.get("tokenizer.ggml.add_eos_token", bool, False),
        chat_template=header.get("tokenizer.chat_template", str, "") or None,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        padding_side="left",
    )


def _token(header: GgufHeader, tokens: list[str], key: str) -> str | None:
    place = header.get(f"tokenizer.ggml.{key}_token_id", int, -1)
    if place >= len(tokens):
        raise ValueError(f"{header.path}: tokenizer.ggml.{key}_token_id is {place}, there are {len(tokens)} tokens")
    return tokens[place] if place >= 0 else None


def _pre(header: GgufHeader) -> str:
    return header.get("tokenizer.ggml.pre", str, "default")


def _byte_level(header: GgufHeader, tokens: list[str], kinds: list[int], unknown: str | None) -> Tokenizer:
    pre = _pre(header)
    if pre not in _PRE:
        raise ValueError(f"{header.path}: a tokenizer.ggml.pre {pre[:50]!r} is not read; {', '.join(_PRE)} are")
    merges = [tuple(merge.split(" ", 1)) for merge in header.get("tokenizer.ggml.merges", list)]
    backend = Tokenizer(BPE({token: place for place, token in enumerate(tokens)}, merges, ignore_merges=pre in _WHOLE_WORDS))
    backend.pre_tokenizer, backend.decoder = _PRE[pre], decoders.ByteLevel()
    return backend


def _sentencepiece(header: GgufHeader, tokens: list[str], kinds: list[int], unknown: str | None) -> Tokenizer:
    scores = header.get("tokenizer.ggml.scores", list)
    if len(scores) != len(tokens):
        raise ValueError(f"{header.path}: {len(scores)} tokenizer.ggml.scores for {len(tokens)} tokens")
    whole = {token for token, kind in zip(tokens, kinds, strict=True) if kind != TokenType.NORMAL}
    vocabulary = {token: place for place, token in enumerate(tokens)}
    merges = generate_merges(vocabulary, dict(zip(tokens, scores, strict=True)), whole)
    backend = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    spaces = normalizers.Replace(" ", _SPACE)
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if header.get("tokenizer.ggml.add_space_prefix", bool, True):
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), spaces])
        steps.append(decoders.Strip(" ", 1, 0))
    else:
        backend.normalizer = spaces
    backend.decoder = decoders.Sequence(steps)
    return backend
