"""A model's text part as a GGUF file, as llama.cpp's converter writes it."""

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from transformers import (
    GemmaConfig,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from mllama.checkpoints.files import write_file
from mllama.checkpoints.gguf.header import gguf
from mllama.checkpoints.gguf.reader import (
    ENDS,
    EOM,
    LLAMA3,
    ORIGINAL_CONTEXT,
    ROPE_FREQS,
    llama3_parameters,
    rope_factors,
    table,
)
from mllama.checkpoints.gguf.tokenizer import add_tokenizer
from mllama.checkpoints.loading import check_plain
from mllama.weights.rows import to_file

_Type = gguf.GGMLQuantizationType
_KINDS = {
    "f16": (_Type.F16, gguf.LlamaFileType.MOSTLY_F16),
    "bf16": (_Type.BF16, gguf.LlamaFileType.MOSTLY_BF16),
    "q8_0": (_Type.Q8_0, gguf.LlamaFileType.MOSTLY_Q8_0),
}
_ACTIVATIONS = {"llama": ("silu", "swish"), "gemma": ("gelu_pytorch_tanh",)}


def save_gguf(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    path: str | os.PathLike,
    dtype: str = "f16",
) -> None:
    """Write a Llama or Gemma decoder and its tokenizer to a GGUF file, whole or not at all.
    llama.cpp runs it, `from_pretrained` reads it.

    Of a vision-language model it is the text part, and a UserWarning says so. Norms and biases are
    float32, and so exact, but for Gemma's: the file holds 1 + w, rounded to float32. Weights of the
    type that is written come back as they were.

    Args:
        model: whose decoder is written.
        tokenizer: goes into the file with its special tokens and chat template. A byte-level BPE
            with a pre-tokenizer that llama.cpp has a name for, or a BPE of SentencePiece.
        path: of the file, *.gguf by custom. Its folder is made if absent.
        dtype: "f16", "bf16" or "q8_0" (blocks of 32 weights in 8 bits and a scale); a matrix whose
            rows are no multiple of 32 is then f16.

    Raises:
        ValueError: a model with LoRA layers, with cross-attention layers or anything else that
            llama.cpp's llama and gemma are not; weights too large for f16; a tokenizer that the
            format cannot hold, or with more tokens than the model; another dtype.
        TypeError: a tokenizer of another kind.
    """
    if dtype not in _KINDS:
        raise ValueError(f"dtype must be one of {', '.join(map(repr, _KINDS))}, got {dtype!r}")
    config = model.config.get_text_config()
    architecture = _architecture(config)
    path, (kind, file_type) = Path(path), _KINDS[dtype]
    ends = _ends(model)
    whole, tied = model.state_dict(), model.get_expanded_tied_weights_keys()
    check_plain(whole)
    state = {
        name: tensor
        for name, tensor in whole.items()
        if name.startswith(("language_model.", "lm_head.")) and name not in tied
    }
    # Norms and biases in float32 from here on: 1 + w would lose most of w in a half.
    tensors = to_file(
        table(config),
        {name: tensor.float() if tensor.dim() == 1 else tensor for name, tensor in state.items()},
    )
    if config.rope_parameters["rope_type"] == "llama3":
        tensors[ROPE_FREQS] = _llama3(config.head_dim, config.rope_parameters)
    kinds = {name: _kind(tensor, kind) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        if kinds[name] == _Type.F16 and bool((tensor.abs() > torch.finfo(torch.float16).max).any()):
            raise ValueError(
                f"{name} has weights beyond float16's largest, {torch.finfo(torch.float16).max:.0f}; write bf16"
            )
    if len(state) + len(tied) < len(whole):
        warnings.warn(
            f"{path} gets the text part of the model; a GGUF file has no place for the rest",
            stacklevel=2,
        )

    def write(aside: Path) -> None:
        writer = gguf.GGUFWriter(aside, architecture)
        writer.add_type(gguf.GGUFType.MODEL)
        writer.add_name(path.stem)
        _add_sizes(writer, config)
        writer.add_file_type(file_type)
        add_tokenizer(writer, tokenizer, config.vocab_size)
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
                writer.write_tensor_data(
                    gguf.quantize(tensor.detach().cpu().float().contiguous().numpy(), kinds[name])
                )
        finally:
            writer.close()

    write_file(path, write)


def _ends(model: PreTrainedModel) -> list[int]:
    """What generation ends with.

    Raises:
        ValueError: an id that is none of the vocabulary's.
    """
    ends, vocabulary = (
        model.generation_config.eos_token_id,
        model.config.get_text_config().vocab_size,
    )
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    if not all(isinstance(end, int) and 0 <= end < vocabulary for end in ends):
        raise ValueError(
            f"generation_config.eos_token_id must be ids of the {vocabulary} tokens, got {ends}"
        )
    return ends


def _add_ends(writer: gguf.GGUFWriter, ends: list[int], tokenizer: PreTrainedTokenizerBase) -> None:
    """The ends that are not the tokenizer's EOS, by the keys that llama.cpp has, and all of them by
    one of ours.
    """
    eom = tokenizer.get_vocab().get(EOM)
    others = [end for end in ends if end not in (eom, tokenizer.eos_token_id)]
    if others:
        writer.add_eot_token_id(others[0])
    if eom in ends and eom != tokenizer.eos_token_id:
        writer.add_eom_token_id(eom)
    if ends:
        writer.add_array(ENDS, ends)


def _kind(tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> gguf.GGMLQuantizationType:
    """As llama.cpp's converter chooses."""
    if tensor.dim() == 1:
        return _Type.F32
    return kind if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0] == 0 else _Type.F16


def _architecture(config: PretrainedConfig) -> str:
    """ "llama" or "gemma".

    Raises:
        ValueError: a decoder that is neither, or that has what llama.cpp's has not.
    """
    if getattr(config, "cross_attention_layers", None):
        raise ValueError(
            "a decoder with cross-attention layers has no place in a GGUF file: llama.cpp has no such model"
        )
    if not isinstance(config, (LlamaConfig, GemmaConfig)):
        raise ValueError(
            f"a decoder of model_type {config.model_type!r} cannot be written as GGUF; Llama's and Gemma's can"
        )
    name = "gemma" if isinstance(config, GemmaConfig) else "llama"
    for field, taken in {
        "hidden_act": _ACTIVATIONS[name],
        "norm_offset": (0, None),  # these three: of our own composition's decoder
        "embedding_scale": (1, None),
        "extra_embeddings": (0, None),
        "use_bidirectional_attention": (False, None),
    }.items():
        if getattr(config, field, None) not in taken:
            raise ValueError(
                f"{field} {getattr(config, field)!r} cannot be written as GGUF: llama.cpp's {name} has {taken[0]!r}"
            )
    rope = config.rope_parameters["rope_type"]
    if rope not in (("default", "linear", "llama3") if name == "llama" else ("default", "linear")):
        raise ValueError(
            f"rope_type {rope!r} cannot be written as GGUF: llama.cpp's {name} has no such scaling"
        )
    if name == "gemma" and not config.tie_word_embeddings:
        raise ValueError(
            "tie_word_embeddings False cannot be written as GGUF: llama.cpp's gemma is tied"
        )
    return name


def _llama3(head_dim: int, parameters: dict) -> torch.Tensor:
    """The rotary factors. Raises ValueError for those that would not be read back as what they are."""
    base, original = parameters["rope_theta"], parameters["original_max_position_embeddings"]
    factors = rope_factors(head_dim, base, parameters).float()
    if llama3_parameters(factors, head_dim, base, original) is None:
        taken = ", ".join(f"{name} {value}" for name, value in LLAMA3.items())
        raise ValueError(
            f"rope_parameters {parameters} cannot be written as GGUF: of rope_type 'llama3' it takes {taken} and a factor above 1"
        )
    return factors


def _add_sizes(writer: gguf.GGUFWriter, config: PretrainedConfig) -> None:
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    rope = config.rope_parameters
    writer.add_rope_freq_base(rope["rope_theta"])
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(rope["factor"])
    if (
        rope["rope_type"] == "llama3"
        and rope["original_max_position_embeddings"] != ORIGINAL_CONTEXT
    ):
        writer.add_rope_scaling_orig_ctx_len(
            rope["original_max_position_embeddings"]
        )  # tells our reader what the factors come of
