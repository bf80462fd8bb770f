"""Linear layers on packed weights for training: inputs are not rounded, and there is a gradient."""

import torch

from mllama.ops._dispatch import autocast_dtype, exact, register, use_kernel
from mllama.ops.packed_layout import PACKINGS, unpack
from mllama.ops.packed_linear import check_layer, check_packing


def dequantized_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_features: int,
    packing: str,
) -> torch.Tensor:
    """x W' + bias with W as `unpack_weight` gives it in x's dtype; gradients for x and bias, but
    not for the frozen W. `packed_linear` is faster where there is nothing to train, and rounds x to
    8 bits beside codes.

    W is dequantized a tile at a time, in the forward pass and in the backward pass, and multiplied
    by torch's matrix product: no dense copy of it is in memory.

    Args:
        x: [..., in_features], float32, bfloat16 or float16. Under torch.autocast it is cast to
            autocast's dtype first, as in nn.Linear; its gradient has its original dtype.
        weight: uint8, as `pack_weight` returns it.
        bias: [out_features], one of x's dtypes, or None.
        out_features: rows of the weight.
        packing: its format.

    Returns:
        [..., out_features] of x's dtype, or autocast's. Saved for the backward pass: the weight
        alone. Can be differentiated once.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: weight has another size than these features and packing give; bias is not
            [out_features].
    """
    check_packing("dequantized_linear", packing)
    number = PACKINGS[packing].number
    dtype = autocast_dtype(x)
    if dtype is not None:
        _check(x, weight, bias, out_features, number)
        x = x.to(dtype)
    with exact(x):
        if use_kernel("packed_linear", x):
            return _dequantized_linear(x, weight, bias, out_features, number)
        _check(x, weight, bias, out_features, number)
        return reference(x, weight, bias, out_features=out_features, packing=packing)


def dequantized_product(
    rows: torch.Tensor, weight: torch.Tensor, in_features: int, packing: str
) -> torch.Tensor:
    """rows W, what `dequantized_linear` gives the gradient of x by: [..., out_features] ->
    [..., in_features]. Not differentiable, and its arguments are not checked.
    """
    if use_kernel("packed_linear", rows):
        number = PACKINGS[packing].number
        return _dequantized_linear_backward(rows, weight, in_features, number)
    return rows @ unpack(weight, rows.shape[-1], in_features, packing).to(rows.dtype)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_features: int,
    packing: str,
) -> torch.Tensor:
    """`dequantized_linear` in plain torch, with a dense copy of the weight."""
    dense = unpack(weight, out_features, x.shape[-1], packing).to(x.dtype)
    return torch.nn.functional.linear(x, dense, None if bias is None else bias.to(x.dtype))


def _check(x, weight, bias, out_features, number) -> None:
    check_layer("dequantized_linear", x, weight, bias, out_features, number)


def _fake(x, weight, bias, out_features, number):
    return x.new_empty((*x.shape[:-1], out_features))


def _setup(ctx, inputs, output):
    x, weight, bias, _, ctx.number = inputs
    ctx.width = x.shape[-1]
    ctx.bias_dtype = None if bias is None else bias.dtype
    ctx.save_for_backward(weight)


def _derivative(ctx, grad_y):
    x_needed, _, bias_needed = ctx.needs_input_grad[:3]
    grad_x = grad_bias = None
    with exact(grad_y):
        if x_needed:
            (weight,) = ctx.saved_tensors
            grad_x = _dequantized_linear_backward(grad_y, weight, ctx.width, ctx.number)
        if bias_needed:
            grad_bias = grad_y[None].flatten(0, -2).sum(0, dtype=ctx.bias_dtype)
    return grad_x, None, grad_bias, None, None


def _backward_fake(grad_y, weight, width, number):
    return grad_y.new_empty((*grad_y.shape[:-1], width))


_dequantized_linear = register(
    "dequantized_linear", check=_check, fake=_fake, backward=_derivative, setup_context=_setup
)
_dequantized_linear_backward = register("_dequantized_linear_backward", fake=_backward_fake)
