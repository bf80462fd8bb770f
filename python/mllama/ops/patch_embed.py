"""Patch embedding: a picture cut into squares that do not overlap, each projected to a vector (convolution with stride = kernel)."""

import torch

from mllama.ops._dispatch import check_float, check_value


def patch_embed(pixel_values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Return the embedding of every patch, row by row from the top left.

    Args:
        pixel_values: [B, C, rows * p, columns * p], float32, bfloat16 or float16.
        weight: [E, C, p, p], one of the same dtypes.
        bias: [E] or None.

    Returns:
        [B, rows * columns, E] of pixel_values' dtype; weight and bias are used in that dtype, sums are taken in float32.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: the kernel is not square, the picture is no multiple of it, channels or bias do not fit.
    """
    check_float("patch_embed", optional=("bias",), pixel_values=pixel_values, weight=weight, bias=bias)
    check_value(pixel_values.dim() == 4, f"patch_embed: pixel_values must be [B, C, height, width], got {tuple(pixel_values.shape)}")
    check_value(
        weight.dim() == 4 and weight.shape[2] == weight.shape[3] > 0,
        f"patch_embed: weight must be [E, C, p, p] with p > 0, got {tuple(weight.shape)}",
    )
    embed, channels, patch, _ = weight.shape
    check_value(
        pixel_values.shape[1] == channels, f"patch_embed: pixel_values have {pixel_values.shape[1]} channels, weight takes {channels}"
    )
    height, width = pixel_values.shape[2:]
    check_value(
        height % patch == 0 and width % patch == 0,
        f"patch_embed: picture of {height} x {width} pixels cannot be cut into patches of {patch} x {patch}",
    )
    check_value(
        bias is None or bias.shape == (embed,), f"patch_embed: bias must be [{embed}], got {None if bias is None else tuple(bias.shape)}"
    )
    return reference(pixel_values, weight, bias)


def reference(pixel_values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """`patch_embed` in plain torch."""
    dtype = pixel_values.dtype
    bias = None if bias is None else bias.to(dtype)
    return torch.nn.functional.conv2d(pixel_values, weight.to(dtype), bias, stride=weight.shape[-1]).flatten(2).transpose(1, 2)
