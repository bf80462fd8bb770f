"""Rows of 8-bit codes, as a quantized key-value cache stores keys and values."""

import torch

from mllama.ops._dispatch import FLOAT_DTYPES, check_dtype, check_tensors, register, use_kernel
from mllama.ops.packed_layout import viewed

GROUP = 32  # codes that share a scale
_SMALLEST_SCALE = 1e-36  # below it a group is zero


def row_bytes(size: int) -> int:
    """Bytes of a row of `size` values: a code for each, and 2 for the scale of every group."""
    return size + 2 * -(-size // GROUP)


def quantize_rows(x: torch.Tensor) -> torch.Tensor:
    """Round rows to 8 bits, symmetric, with a bfloat16 scale for 32 values of a row.

    Args:
        x: [..., size], float32, bfloat16 or float16.

    Returns:
        int8 [..., row_bytes(size)]: codes in [-127, 127], then the scales. A group with a value
        that is not finite becomes NaN.

    Raises:
        TypeError: x is no tensor, or of another dtype.
        ValueError: x has no dimension.
    """
    if use_kernel("quantized_rows", x):
        return _quantize_rows(x)
    _check_quantize(x)
    return reference_quantize(x)


def dequantize_rows(
    codes: torch.Tensor, size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """The values that `quantize_rows` stored.

    Args:
        codes: int8 [..., row_bytes(size)].
        size: values of a row.
        dtype: of the result.

    Returns:
        [..., size].

    Raises:
        TypeError: codes is no int8 tensor, or dtype is none of float32, bfloat16 and float16.
        ValueError: codes has rows of another size.
    """
    if use_kernel("quantized_rows", codes):
        return _dequantize_rows(codes, size, dtype)
    _check_dequantize(codes, size, dtype)
    return reference_dequantize(codes, size, dtype)


def reference_quantize(x: torch.Tensor) -> torch.Tensor:
    """`quantize_rows` in plain torch."""
    size = x.shape[-1]
    groups = torch.nn.functional.pad(x.float(), (0, -size % GROUP)).unflatten(-1, (-1, GROUP))
    poison = (groups * 0).sum(-1, keepdim=True)  # NaN where a value is not finite
    scale = (groups.abs().amax(-1, keepdim=True) / 127 + poison).bfloat16()
    scale = scale.masked_fill(scale < _SMALLEST_SCALE, 0)
    inverse = torch.where(scale > 0, 1 / scale.float(), 0)
    # In float64 the product is exact, and rounded once, as in the kernels.
    codes = torch.round(groups.double() * inverse.double()).nan_to_num().clamp(-127, 127)
    scales = scale.flatten().view(torch.int8).view(*x.shape[:-1], 2 * scale.shape[-2])
    return torch.cat([codes.to(torch.int8).flatten(-2)[..., :size], scales], -1)


def reference_dequantize(
    codes: torch.Tensor, size: int, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    """`dequantize_rows` in plain torch."""
    scales = viewed(codes[..., size:].flatten(), torch.bfloat16).float()
    scales = scales.view(*codes.shape[:-1], -(-size // GROUP))
    return (codes[..., :size] * scales.repeat_interleave(GROUP, -1)[..., :size]).to(dtype)


def _check_quantize(x) -> None:
    check_tensors("quantize_rows", x=x)
    if x.dim() == 0:
        raise ValueError("quantize_rows: x must have at least one dimension")


def _check_dequantize(codes, size, dtype) -> None:
    check_dtype("dequantize_rows", "codes", codes, torch.int8)
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"dequantize_rows: dtype must be float32, bfloat16 or float16, got {dtype}")
    if codes.dim() == 0 or codes.shape[-1] != row_bytes(size):
        raise ValueError(
            f"dequantize_rows: codes must be [..., {row_bytes(size)}] for rows of {size} values, "
            f"got {list(codes.shape)}"
        )


def _quantize_fake(x):
    return x.new_empty((*x.shape[:-1], row_bytes(x.shape[-1])), dtype=torch.int8)


def _dequantize_fake(codes, size, dtype):
    return codes.new_empty((*codes.shape[:-1], size), dtype=dtype)


_quantize_rows = register(
    "quantize_rows",
    check=_check_quantize,
    fake=_quantize_fake,
    why="quantized caches are for inference",
)
_dequantize_rows = register("dequantize_rows", check=_check_dequantize, fake=_dequantize_fake)
