"""Types of the tensors in a GGUF file that is written, and their blocks."""

import re
from collections.abc import Mapping

import numpy as np
import torch

from mllama.checkpoints.gguf.header import gguf
from mllama.ops import pack_weight, unpack_gguf

_Type, _File = gguf.GGMLQuantizationType, gguf.LlamaFileType
FILE_TYPES = {
    "f16": (_Type.F16, _File.MOSTLY_F16),
    "bf16": (_Type.BF16, _File.MOSTLY_BF16),
    "q8_0": (_Type.Q8_0, _File.MOSTLY_Q8_0),
    "q4_0": (_Type.Q4_0, _File.MOSTLY_Q4_0),
    "q4_k": (_Type.Q4_K, _File.MOSTLY_Q4_K_M),
}
# What takes a type's place where rows are not whole blocks of it.
_FALLBACK = {_Type.Q4_K: _Type.Q5_0, _Type.Q5_K: _Type.Q5_1, _Type.Q6_K: _Type.Q8_0}
# Quantized here: the gguf library has no K-quants, and fits no scales. It writes the others.
_OWN = {
    kind: kind.name.lower() for kind in (_Type.Q4_0, _Type.Q5_0, _Type.Q4_K, _Type.Q5_K, _Type.Q6_K)
}
_HALF_MAX = torch.finfo(torch.float16).max
# The largest weight: these have it as a float16, or as a float16 times a code.
_LARGEST = {_Type.F16: 1, _Type.Q8_0: 127}
_VARIED = re.compile(r"blk\.(\d+)\.(attn_v|ffn_down)\.weight")


def choose_types(
    tensors: Mapping[str, torch.Tensor], dtype: str, layers: int
) -> dict[str, gguf.GGMLQuantizationType]:
    """The type of every tensor, chosen as llama.cpp does (llama-quant.cpp): vectors are F32. With
    4-bit weights, the head is Q6_K, whether it is a matrix of its own or the embeddings; of "q4_k",
    which is Q4_K_M, so are attn_v and ffn_down in the first and last eighth of the layers and in
    every third between; other attn_v of a 70B model, 80 layers with few key-value heads, are Q5_K.
    Rows that are not whole blocks of 256 are Q5_0 in place of Q4_K, Q5_1 in place of Q5_K and Q8_0
    in place of Q6_K; those that are not whole blocks of 32 are F16.

    Args:
        tensors: by their names in the file.
        dtype: one of FILE_TYPES.
        layers: of the model.

    Raises:
        ValueError: weights are too large for their type, or NaN.
    """
    head = "output.weight" if "output.weight" in tensors else "token_embd.weight"
    return {name: _choose(name, tensor, dtype, layers, head) for name, tensor in tensors.items()}


def _choose(name: str, tensor: torch.Tensor, dtype: str, layers: int, head: str):
    if tensor.dim() == 1:
        return _Type.F32
    kind, _ = FILE_TYPES[dtype]
    varied = _VARIED.fullmatch(name) if dtype == "q4_k" else None
    if dtype in ("q4_0", "q4_k") and (name == head or (varied and _more(int(varied[1]), layers))):
        kind = _Type.Q6_K
    elif varied and varied[2] == "attn_v" and layers == 80 and tensor.shape[0] < tensor.shape[1]:
        kind = _Type.Q5_K
    for other in (_FALLBACK.get(kind, _Type.F16), _Type.F16):
        if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = other
    largest = _LARGEST.get(kind, 0) * _HALF_MAX
    if largest and not bool((tensor.abs() <= largest).all()):
        problem = "NaN" if bool(tensor.isnan().any()) else f"weights beyond {largest:.0f}"
        raise ValueError(f"{name} has {problem}, which {kind.name} cannot hold; bf16 can")
    return kind


def _more(layer: int, layers: int) -> bool:
    """Whether a layer gets more bits."""
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


def to_blocks(name: str, tensor: torch.Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """A tensor in a type.

    Args:
        name: its name in the file, for errors.
        tensor: of any floating dtype; its rows are whole blocks.

    Raises:
        ValueError: it has values that the type cannot hold.
    """
    values = tensor.detach().cpu().float().contiguous()
    if kind not in _OWN:
        return gguf.quantize(values.numpy(), kind)
    try:
        packed = pack_weight(values, _OWN[kind])
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    return unpack_gguf(packed, *values.shape, _OWN[kind]).numpy()
