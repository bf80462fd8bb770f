"""Patch embedding: cuts an image into non-overlapping squares and projects each to a vector
(convolution with stride = kernel size).
"""

import torch

from mllama.ops._dispatch import check_tensors, exact, register, use_kernel


def patch_embed(
    pixel_values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Embed every patch, row by row from the top left.

    Args:
        pixel_values: [B, C, rows * p, columns * p], float32, bfloat16 or float16.
        weight: [E, C, p, p], of the same dtypes.
        bias: [E] or None.

    Returns:
        [B, rows * columns, E] in pixel_values' dtype; weight and bias are cast to it, sums are
        computed in float32.

    Raises:
        TypeError: an argument is not a tensor of these dtypes.
        ValueError: the kernel is not square, the image size is not a multiple of it, or channels
            or bias do not fit.
    """
    with exact(pixel_values):  # the kernel's matrix product is torch's
        if use_kernel("patch_embed", pixel_values):
            return _patch_embed(pixel_values, weight, bias)
        _check(pixel_values, weight, bias)
        return reference(pixel_values, weight, bias)


def reference(
    pixel_values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """`patch_embed` in plain torch."""
    dtype = pixel_values.dtype
    bias = None if bias is None else bias.to(dtype)
    return (
        torch.nn.functional.conv2d(pixel_values, weight.to(dtype), bias, stride=weight.shape[-1])
        .flatten(2)
        .transpose(1, 2)
    )


def _check(pixel_values, weight, bias) -> None:
    check_tensors(
        "patch_embed", optional=("bias",), pixel_values=pixel_values, weight=weight, bias=bias
    )
    if pixel_values.dim() != 4:
        raise ValueError(
            "patch_embed: pixel_values must be [B, C, height, width], "
            f"got {list(pixel_values.shape)}"
        )
    if (
        weight.dim() != 4
        or weight.shape[2] != weight.shape[3]
        or weight.shape[3] == 0
        or weight.shape[1] == 0
    ):
        raise ValueError(
            f"patch_embed: weight must be [E, C, p, p] with C and p > 0, got {list(weight.shape)}"
        )
    embed, channels, patch, _ = weight.shape
    if pixel_values.shape[1] != channels:
        raise ValueError(
            f"patch_embed: pixel_values have {pixel_values.shape[1]} channels, "
            f"weight takes {channels}"
        )
    height, width = pixel_values.shape[2:]
    if height % patch or width % patch:
        raise ValueError(
            f"patch_embed: pixel_values of {height} x {width} pixels cannot be cut into patches "
            f"of {patch} x {patch}"
        )
    if bias is not None and bias.shape != (embed,):
        raise ValueError(f"patch_embed: bias must be [{embed}], got {list(bias.shape)}")


def _fake(pixel_values, weight, bias):
    batch, _, height, width = pixel_values.shape
    embed, _, patch, _ = weight.shape
    return pixel_values.new_empty(batch, (height // patch) * (width // patch), embed)


def _setup(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _derivative(ctx, grad_y):
    if grad_y is None:
        return None, None, None
    with exact(grad_y):
        gradients = _patch_embed_backward(grad_y, *ctx.saved_tensors, *ctx.needs_input_grad)
    return tuple(
        gradient if needed else None
        for gradient, needed in zip(gradients, ctx.needs_input_grad, strict=True)
    )


def _backward_fake(grad_y, pixel_values, weight, bias, *needed):
    inputs = (pixel_values, weight, weight if bias is None else bias)
    needed = (*needed[:2], needed[2] and bias is not None)
    return tuple(
        x.new_empty(x.shape if need else 0) for x, need in zip(inputs, needed, strict=True)
    )


_patch_embed = register(
    "patch_embed", check=_check, fake=_fake, backward=_derivative, setup_context=_setup
)
_patch_embed_backward = register("_patch_embed_backward", fake=_backward_fake)
