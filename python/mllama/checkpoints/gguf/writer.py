"""Writes a model's text part as a GGUF file, as llama.cpp's converter does."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mllama.checkpoints.files import write_file
from mllama.checkpoints.gguf.blocks import FILE_TYPES, choose_types, to_blocks
from mllama.checkpoints.gguf.header import gguf
from mllama.checkpoints.gguf.reader import ARCHITECTURES, ENDS, EOM, weight_map
from mllama.checkpoints.gguf.rope import (
    LLAMA3,
    ORIGINAL_CONTEXT,
    ROPE_FREQS,
    llama3_parameters,
    rope_factors,
)
from mllama.checkpoints.gguf.tokenizer import add_tokenizer
from mllama.checkpoints.loading import check_plain
from mllama.checkpoints.models import tied_names
from mllama.config.spec import LayerSpec, ModelSpec, RopeSpec, TextSpec
from mllama.weights.family import Gguf
from mllama.weights.rows import to_file


def write_gguf(
    spec: ModelSpec,
    state_dict: Mapping[str, torch.Tensor],
    tokenizer: Any,
    path: str | os.PathLike,
    dtype: str = "f16",
    ends: Sequence[int] = (),
) -> None:
    """Write a Llama or Gemma decoder and its tokenizer to a GGUF file, atomically. llama.cpp and
    `from_pretrained` can read it.

    A UserWarning says so if other parts of a vision-language model are left out. Norms and biases
    are float32 and exact, except Gemma's norms: the file has 1 + w, rounded to float32. Weights
    already in the written dtype are exact.

    Args:
        spec: the model's spec.
        state_dict: the model's state dict.
        tokenizer: transformers' tokenizer, written with its special tokens and chat template. A
            byte-level BPE with a pre-tokenizer that llama.cpp knows, or a SentencePiece BPE.
        path: the file, usually *.gguf. Its folder is created if needed.
        dtype: "f16", "bf16", or blocks of 8 or about 4 bits a weight, "q8_0", "q4_0" and "q4_k".
            `choose_types` says which tensors get others.
        ends: ids that end generation.

    Raises:
        ValueError: the model has LoRA layers, cross-attention layers or anything else that
            llama.cpp's llama and gemma do not have; weights are too large for their type; the
            tokenizer cannot be represented, or has more tokens than the model; dtype is unknown.
        TypeError: the tokenizer is of another type.
    """
    if dtype not in FILE_TYPES:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, FILE_TYPES))}, got {dtype!r}")
    text = spec.text
    gguf_form = find_gguf_form(text)
    path, (_, file_type) = Path(path), FILE_TYPES[dtype]
    _check_ends(ends, text.vocab_size)
    check_plain(state_dict)
    tied = tied_names(spec)
    state = {
        name: tensor
        for name, tensor in state_dict.items()
        if name.startswith(("language_model.", "lm_head.")) and name not in tied
    }
    # Norms and biases are float32 from here on: 1 + w would lose most of w in 16 bits.
    tensors = to_file(
        weight_map(gguf_form, spec),
        {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in state.items()},
    )
    if (rope := text.layers[0].rope).rope_type == "llama3":
        tensors[ROPE_FREQS] = _llama3(text.head_dim, rope)
    kinds = choose_types(tensors, dtype, text.num_hidden_layers)
    if len(state) + len(tied) < len(state_dict):
        warnings.warn(
            f"{path} gets the text part of the model; a GGUF file has no place for the rest",
            stacklevel=2,
        )

    def write(aside: Path) -> None:
        writer = gguf.GGUFWriter(aside, gguf_form.architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(path.stem)
        _add_sizes(writer, text)
        writer.add_file_type(file_type)
        add_tokenizer(writer, tokenizer, text.vocab_size)
        _add_ends(writer, ends, tokenizer)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for name, tensor in tensors.items():
            block, size = gguf.GGML_QUANT_SIZES[kinds[name]]
            writer.add_tensor_info(
                name,
                tuple(tensor.shape),
                np.dtype(np.float32),
                tensor.numel() // block * size,
                kinds[name],
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for name, tensor in tensors.items():
                writer.write_tensor_data(to_blocks(name, tensor, kinds[name]))
        finally:
            writer.close()

    write_file(path, write)


def _check_ends(ends: Sequence[int], vocabulary: int) -> None:
    if not all(isinstance(end, int) and 0 <= end < vocabulary for end in ends):
        raise ValueError(
            f"generation_config.eos_token_id must be ids of the {vocabulary} tokens, "
            f"got {list(ends)}"
        )


def _add_ends(writer: gguf.GGUFWriter, ends: Sequence[int], tokenizer: Any) -> None:
    """Write the end ids other than the tokenizer's EOS under llama.cpp's keys, and all of them
    under our own.
    """
    eom = tokenizer.get_vocab().get(EOM)
    others = [end for end in ends if end not in (eom, tokenizer.eos_token_id)]
    if others:
        writer.add_eot_token_id(others[0])
    if eom in ends and eom != tokenizer.eos_token_id:
        writer.add_eom_token_id(eom)
    if ends:
        writer.add_array(ENDS, list(ends))


def find_gguf_form(text: TextSpec) -> Gguf:
    """llama.cpp's format for a decoder.

    Raises:
        ValueError: there is none; the message names the field.
    """
    if text.cross_attention_layers:
        raise ValueError(
            "a decoder with cross_attention_layers has no place in a GGUF file: llama.cpp has no "
            "such model"
        )
    forms = [family.gguf for family in ARCHITECTURES.values()]
    form = next((form for form in forms if form.norm_shift == text.norm_offset), forms[0])
    scale = text.hidden_size**0.5 if form.norm_shift else 1
    taken = {
        "norm_offset": (form.norm_shift,),
        "embedding_scale": (scale, None) if scale == 1 else (scale,),
        "extra_embeddings": (0,),
        "hidden_act": form.hidden_act,
        "tie_word_embeddings": (True,) if form.tied else (True, False),
    }
    for field, values in taken.items():
        if getattr(text, field) not in values:
            raise ValueError(
                f"{field} {getattr(text, field)!r} cannot be written as GGUF: llama.cpp's "
                f"{form.architecture} has {values[0]!r}"
            )
    rope = text.layers[0].rope
    if {*text.layers} != {LayerSpec(rope=rope)}:
        raise ValueError(
            "layers that differ, or with a window, a softcap or post-norms, cannot be "
            "written as GGUF"
        )
    if rope.rope_type not in form.rope_types:
        raise ValueError(
            f"rope_type {rope.rope_type!r} cannot be written as GGUF: llama.cpp's "
            f"{form.architecture} has no "
            "such scaling"
        )
    return form


def _llama3(head_dim: int, rope: RopeSpec) -> torch.Tensor:
    """The rotary factors. Raises ValueError if they would not be read back equal."""
    parameters = asdict(rope)
    base, original = rope.rope_theta, rope.original_max_position_embeddings
    factors = rope_factors(head_dim, base, parameters).float()
    if llama3_parameters(factors, head_dim, base, original) is None:
        taken = ", ".join(f"{name} {value}" for name, value in LLAMA3.items())
        raise ValueError(
            f"rope_parameters {parameters} cannot be written as GGUF: of rope_type 'llama3' it "
            "takes "
            f"{taken} and a factor above 1"
        )
    return factors


def _add_sizes(writer: gguf.GGUFWriter, text: TextSpec) -> None:
    writer.add_vocab_size(text.vocab_size)
    writer.add_context_length(text.max_position_embeddings)
    writer.add_embedding_length(text.hidden_size)
    writer.add_block_count(text.num_hidden_layers)
    writer.add_feed_forward_length(text.intermediate_size)
    writer.add_head_count(text.num_attention_heads)
    writer.add_head_count_kv(text.num_key_value_heads)
    writer.add_key_length(text.head_dim)
    writer.add_value_length(text.head_dim)
    writer.add_layer_norm_rms_eps(text.rms_norm_eps)
    writer.add_rope_dimension_count(text.head_dim)
    rope = text.layers[0].rope
    writer.add_rope_freq_base(rope.rope_theta)
    if rope.rope_type == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope.factor)
    # Our reader derives the factors' parameters from it.
    original = rope.original_max_position_embeddings
    if rope.rope_type == "llama3" and original != ORIGINAL_CONTEXT:
        writer.add_rope_scaling_orig_ctx_len(original)
