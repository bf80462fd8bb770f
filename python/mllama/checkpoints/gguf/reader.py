"""Reads GGUF files (llama.cpp): text models of the architectures `llama`, `gemma`, `gemma2` and
`gemma3`, in every block type that the gguf library supports.

A file has the weights, the sizes and the tokenizer (`tokenizer.py`); `writer.py` writes one. It
differs from Hugging Face's layout: rows of a llama's q_proj and k_proj are permuted (rotary pairs
are neighbors), a gemma's norms are stored as 1 + w, and Llama 3's rotary scaling is a tensor of
factors.
"""

import os
from functools import partial
from typing import Any

import numpy as np
import torch

from mllama.checkpoints.gguf.header import GgufHeader, gguf
from mllama.checkpoints.gguf.rope import ROPE_FREQS, read_rope
from mllama.checkpoints.gguf.windows import WINDOWED, window_arguments
from mllama.checkpoints.opened import Opened, check_config
from mllama.checkpoints.sources import Header, Source
from mllama.config.spec import ModelSpec
from mllama.families import FAMILIES
from mllama.weights.family import Config, Gguf
from mllama.weights.rows import Drop, Permute, Rename, Row, Shift, WeightMap

# Our own key: all ids that end generation, in order. llama.cpp has keys for three, and finds others
# by their text.
ENDS = "mllama.eos_token_ids"
EOM = "<|eom_id|>"  # the end of a message that calls a tool
# Tokens that end an answer in llama.cpp if the vocabulary has them (llama-vocab.cpp).
_TURN_ENDS = (
    "<|eot_id|>",
    "<|im_end|>",
    "<|end|>",
    "<end_of_turn>",
    "<|endoftext|>",
    "<|end_of_text|>",
    EOM,
)
_CONTROL_ENDS = (
    "</s>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<|return|>",
    "<|call|>",
    "<end_of_utterance>",
)  # unless they are plain text

_Type = gguf.GGMLQuantizationType
_PLAIN = {_Type.F32: torch.float32, _Type.F16: torch.float16, _Type.BF16: torch.bfloat16}


ARCHITECTURES = {
    family.gguf.architecture: family for family in FAMILIES.values() if family.gguf is not None
}


def weight_map(gguf: Gguf, spec: ModelSpec) -> WeightMap:
    """The rows between a GGUF file's tensors and the text part of a model.

    Args:
        gguf: format of the decoder's family.
        spec: the model's spec.
    """
    norm = [Shift(-gguf.norm_shift)] if gguf.norm_shift else []
    norms = _FOUR_NORMS if spec.text.layers[0].post_norms else _TWO_NORMS
    q, k = (
        [Permute(heads)] if gguf.permuted else []
        for heads in (spec.text.num_attention_heads, spec.text.num_key_value_heads)
    )
    layer, block = "language_model.layers.{}", "blk.{}"
    rows: list[Row] = [
        Rename("language_model.embed_tokens.weight", "token_embd.weight"),
        Rename("language_model.norm.weight", "output_norm.weight", steps=norm),
        Rename("lm_head.weight", "output.weight"),
        *(
            Rename(f"{layer}.{name}.weight", f"{block}.{theirs}.weight", steps=norm)
            for name, theirs in norms.items()
        ),
        Rename(f"{layer}.self_attn.q_proj.*", f"{block}.attn_q.*", steps=q),
        Rename(f"{layer}.self_attn.k_proj.*", f"{block}.attn_k.*", steps=k),
        Rename(f"{layer}.self_attn.v_proj.*", f"{block}.attn_v.*"),
        Rename(f"{layer}.self_attn.o_proj.*", f"{block}.attn_output.*"),
        *(
            Rename(f"{layer}.mlp.{name}_proj.*", f"{block}.ffn_{name}.*")
            for name in ("gate", "up", "down")
        ),
        Drop(ROPE_FREQS),  # the config has its content
    ]
    return rows


_TWO_NORMS = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
_FOUR_NORMS = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "self_attn.q_norm": "attn_q_norm",  # this and the next: Gemma 3
    "self_attn.k_norm": "attn_k_norm",
}


class GgufSource(Source):
    """The tensors of a GGUF file.

    F32, F16 and BF16 are read unchanged. Quantized blocks are dequantized to float32, so "auto",
    the dtype of most elements, is float32 for a quantized file.
    """

    def __init__(self, header: GgufHeader):
        """
        Raises:
            ValueError: the gguf library cannot dequantize a block type.
        """
        self.where = str(header.path)
        self._path = header.path
        self._tensors = {
            name: (tensor.tensor_type, tuple(tensor.data.shape), tensor.data_offset, tensor.n_bytes)
            for name, tensor in header.tensors.items()
        }
        self._headers = {}
        for name, tensor in header.tensors.items():
            _check_type(self.where, name, tensor.tensor_type)
            kind = tensor.tensor_type
            self._headers[name] = Header(
                tuple(tensor.shape[::-1].tolist()),
                _PLAIN.get(kind, torch.float32),
                None if kind in _PLAIN else kind.name,
            )

    def headers(self) -> dict[str, Header]:
        """Every tensor's shape, and the dtype that `read` returns."""
        return self._headers

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory of its own.

        Raises:
            ValueError: the file has become shorter.
        """
        kind, stored, _, _ = self._tensors[name]
        data = self._bytes(name)
        if kind in _PLAIN:
            return torch.from_numpy(data).view(_PLAIN[kind]).reshape(self._headers[name].shape)
        with np.errstate(
            all="ignore"
        ):  # a broken file's scales may be infinite, and its weights too
            return torch.from_numpy(gguf.dequantize(data.reshape(stored), kind))

    def read_blocks(self, name: str) -> torch.Tensor:
        """Read the bytes of a tensor of blocks.

        Returns:
            uint8 [rows, bytes of a row].

        Raises:
            ValueError: the file has become shorter.
        """
        _, stored, _, _ = self._tensors[name]
        return torch.from_numpy(self._bytes(name).reshape(stored))

    def _bytes(self, name: str) -> np.ndarray:
        _, _, offset, size = self._tensors[name]
        data = np.fromfile(self._path, np.uint8, size, offset=offset)
        if data.nbytes != size:
            raise ValueError(f"{self.where} ends within {name}")
        return data


def _check_type(where: str, name: str, kind: gguf.GGMLQuantizationType) -> None:
    block, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError as error:
        raise ValueError(
            f"{where}: {name} has the type {kind.name}, which the gguf library cannot dequantize"
        ) from error


def open_gguf(path: str | os.PathLike, config: Config | None = None) -> Opened:
    """Open a GGUF file. Reads its header, and of the tensors only the rotary factors.

    Args:
        path: the file.
        config: replaces the file's own.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a valid GGUF file, is one of several parts, or has an unsupported
            model.
        TypeError: config is another family's.
    """
    header = GgufHeader(path)
    if (parts := header.get("split.count", int, 1)) > 1:
        raise ValueError(
            f"{path} is one of {parts} parts; llama.cpp's gguf-split --merge makes one file of them"
        )
    source = GgufSource(header)
    architecture = header.get("general.architecture", str)
    if architecture not in ARCHITECTURES:
        raise ValueError(
            f"{path}: the architecture {architecture[:50]!r} is not read; "
            f"{' and '.join(ARCHITECTURES)} are"
        )
    family = ARCHITECTURES[architecture]
    content = _sizes(header, architecture) | _ids(header)
    content |= {"model_type": family.name, "hidden_act": family.gguf.hidden_act[0]}
    rope = read_rope(header, architecture, source, content["head_dim"])
    if architecture in WINDOWED:
        content |= window_arguments(header, architecture, content, rope)
    else:
        content["rope_parameters"] = rope
    generation = {
        name: content[name]
        for name in ("bos_token_id", "eos_token_id", "pad_token_id")
        if content[name] is not None
    }
    rows = partial(weight_map, family.gguf)
    if config is not None:
        check_config(config, family)
        return Opened.of(config, source, rows, generation)
    try:
        return Opened.of(content, source, rows, generation)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _sizes(header: GgufHeader, architecture: str) -> dict[str, Any]:
    def size(name: str, default: int | None = None) -> int:
        value = header.get(f"{architecture}.{name}", int, default)
        if value < 1:
            raise ValueError(f"{header.path}: {architecture}.{name} must be positive, got {value}")
        return value

    layers, hidden, heads = (
        size("block_count"),
        size("embedding_length"),
        size("attention.head_count"),
    )
    if layers > len(header.tensors):
        raise ValueError(
            f"{header.path}: {architecture}.block_count is {layers}, the file holds "
            f"{len(header.tensors)} tensors in all"
        )
    embedding = header.tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise ValueError(f"{header.path} has no matrix token_embd.weight")
    head = size("attention.key_length", max(hidden // heads, 1))
    for name, same in (
        ("attention.value_length", "attention.key_length"),
        ("rope.dimension_count", "attention.key_length"),
    ):
        if size(name, head) != head:
            raise ValueError(
                f"{header.path}: {architecture}.{name} is {size(name)}, {same} is {head}; they "
                "must be equal"
            )
    if header.get(f"{architecture}.expert_count", int, 0):
        raise ValueError(
            f"{header.path}: models of several experts are not read, {architecture}.expert_count "
            "is above 0"
        )
    return {
        "vocab_size": int(embedding.shape[1]),
        "hidden_size": hidden,
        "intermediate_size": size("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "head_dim": head,
        "max_position_embeddings": size("context_length"),
        "rms_norm_eps": header.get(f"{architecture}.attention.layer_norm_rms_epsilon", float),
        "tie_word_embeddings": "output.weight" not in header.tensors,
        "attention_bias": "blk.0.attn_q.bias" in header.tensors,
    } | ({"mlp_bias": "blk.0.ffn_gate.bias" in header.tensors} if architecture == "llama" else {})


def _ids(header: GgufHeader) -> dict[str, Any]:
    """The special tokens' ids; None for those that the file does not name, because a config's
    defaults are another model's.
    """
    found: dict[str, Any] = {}
    vocabulary = int(header.tensors["token_embd.weight"].shape[1])
    for name, key in (
        ("bos", "bos"),
        ("eos", "eos"),
        ("eot", "eot"),
        ("eom", "eom"),
        ("pad", "padding"),
    ):
        value = header.get(f"tokenizer.ggml.{key}_token_id", int, -1)
        if value >= vocabulary:
            raise ValueError(
                f"{header.path}: tokenizer.ggml.{key}_token_id is {value}, the vocabulary has "
                f"{vocabulary} tokens"
            )
        found[f"{name}_token_id"] = value if value >= 0 else None
    # The end of a text, and the end of a chat answer if it is another token.
    named = [
        value
        for name in ("eos", "eot", "eom")
        if (value := found.pop(f"{name}_token_id")) is not None
    ]
    ends = header.get(ENDS, list, []) or list(
        dict.fromkeys([*named, *_ends_by_text(header, vocabulary)])
    )
    if not all(type(end) is int and 0 <= end < vocabulary for end in ends):
        raise ValueError(
            f"{header.path}: {ENDS} must be ids of the {vocabulary} tokens, got {str(ends)[:100]}"
        )
    found["eos_token_id"] = ends if len(ends) > 1 else ends[0] if ends else None
    return found


def _ends_by_text(header: GgufHeader, vocabulary: int) -> list[int]:
    tokens = header.get("tokenizer.ggml.tokens", list, [])[:vocabulary]
    kinds = header.get("tokenizer.ggml.token_type", list, [])
    control = (gguf.TokenType.CONTROL, gguf.TokenType.USER_DEFINED)
    return [
        place
        for place, token in enumerate(tokens)
        if token in _TURN_ENDS
        or (token in _CONTROL_ENDS and place < len(kinds) and kinds[place] in control)
    ]
