"""Layer normalization (Ba et al., 2016) over the last dimension, with weight and bias."""

import functools

import torch

from mllama.ops._dispatch import (
    check_eps,
    check_tensors,
    check_vectors,
    fresh,
    register,
    use_kernel,
)
from mllama.ops.recompute import recomputable


def layer_norm(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        weight, bias: [D], of x's dtype, or float32 with 16-bit x.
        eps: added to the (biased) variance.

    Returns:
        [..., D] in x's dtype. Statistics and product are computed in float32 and rounded once.

    Raises:
        TypeError: an argument is not a tensor of these dtypes; eps is not a number.
        ValueError: weight or bias is not [D], or eps is negative or not finite.
    """
    check_eps("layer_norm", eps)
    if use_kernel("layer_norm", x):
        y = _layer_norm(x, weight, bias, eps)[0]
        return recomputable(y, functools.partial(layer_norm, eps=eps), x, weight, bias)
    _check(x, weight, bias, eps)
    return reference(x, weight, bias, eps)


def reference(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6
) -> torch.Tensor:
    """`layer_norm` in plain torch."""
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * weight.float() + bias.float()).to(x.dtype)


def _check(x, weight, bias, eps) -> None:
    check_tensors("layer_norm", x=x, weight=weight, bias=bias)
    check_vectors("layer_norm", x, weight=weight, bias=bias)


def _setup(ctx, inputs, output):
    x, weight, bias, _ = inputs
    statistics = output[1]
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, statistics)


def _derivative(ctx, grad_y, grad_statistics):
    if grad_y is None:
        return None, None, None, None
    _, weight, bias, _ = ctx.needs_input_grad
    grad_x, grad_weight, grad_bias = _layer_norm_backward(
        grad_y, *ctx.saved_tensors, weight or bias
    )
    return grad_x, grad_weight if weight else None, grad_bias if bias else None, None


def _fake(x, weight, bias, eps):
    return fresh(x), x.new_empty((*x.shape[:-1], 2), dtype=torch.float32)


_layer_norm = register(
    "layer_norm", check=_check, fake=_fake, backward=_derivative, setup_context=_setup
)
_layer_norm_backward = register(
    "_layer_norm_backward",
    fake=lambda grad_y, x, weight, bias, statistics, parameter_gradients: (
        fresh(x),
        *(fresh(p) if parameter_gradients else p.new_empty(0) for p in (weight, bias)),
    ),
)
