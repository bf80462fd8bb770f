"""RMS normalization (Zhang and Sennrich, 2019), optionally after a residual addition."""

import functools
import math

import torch

from mllama.ops._dispatch import (
    check_eps,
    check_number,
    check_tensors,
    check_vectors,
    fresh,
    kind,
    register,
    use_kernel,
)
from mllama.ops.recompute import recomputable


def rms_norm(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, offset: float = 0.0
) -> torch.Tensor:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension.

    Without an offset the order is Llama's: the normalized x is rounded to its dtype, then
    multiplied by weight. With an offset it is Gemma's (offset 1): everything in float32, rounded
    once at the end.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        weight: [D], of x's dtype, or float32 with 16-bit x.
        eps: added to the mean of squares.
        offset: added to every weight.

    Returns:
        [..., D] in x's dtype. Statistics are computed in float32.

    Raises:
        TypeError: an argument is not a tensor of these dtypes; eps or offset is not a number.
        ValueError: weight is not [D], eps is negative or not finite, or offset is not finite.
    """
    check_eps("rms_norm", eps)
    _check_offset("rms_norm", offset)
    if use_kernel("rms_norm", x):
        return _noted(_rms_norm(x, weight, eps, offset)[0], x, weight, eps, offset)
    _check(x, weight, eps, offset)
    return reference(x, weight, eps, offset)


def add_rms_norm(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rms_norm` of x + residual, in one pass.

    Args:
        x, weight, eps, offset: as in `rms_norm`.
        residual: as x.

    Returns:
        (rms_norm(hidden), hidden) with hidden = x + residual, both [..., D] in x's dtype.

    Raises:
        TypeError: an argument is not a tensor of these dtypes; eps or offset is not a number.
        ValueError: as `rms_norm`, or residual differs from x in shape or dtype.
    """
    check_eps("add_rms_norm", eps)
    _check_offset("add_rms_norm", offset)
    if use_kernel("rms_norm", x):
        y, hidden, _ = _add_rms_norm(x, residual, weight, eps, offset)
        return _noted(y, hidden, weight, eps, offset), hidden
    _add_check(x, residual, weight, eps, offset)
    return add_reference(x, residual, weight, eps, offset)


def reference(
    x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6, offset: float = 0.0
) -> torch.Tensor:
    """`rms_norm` in plain torch."""
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    if offset == 0:
        return (h.to(x.dtype) * weight).to(x.dtype)
    return (h * (offset + weight.float())).to(x.dtype)


def add_reference(
    x: torch.Tensor,
    residual: torch.Tensor,
    weight: torch.Tensor,
    eps: float = 1e-6,
    offset: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in plain torch."""
    hidden = x + residual
    return reference(hidden, weight, eps, offset), hidden


def _noted(y, hidden, weight, eps, offset) -> torch.Tensor:
    function = functools.partial(rms_norm, eps=eps, offset=offset)
    return recomputable(y, function, hidden, weight)


def _check_offset(op: str, offset: float) -> None:
    check_number(op, "offset", offset)
    if (
        not -math.inf < offset < math.inf
    ):  # math.isfinite breaks the graph under torch 2.11's compiler
        raise ValueError(f"{op}: offset must be finite, got {offset}")


def _check(x, weight, eps, offset) -> None:
    check_tensors("rms_norm", x=x, weight=weight)
    check_vectors("rms_norm", x, weight=weight)


def _add_check(x, residual, weight, eps, offset) -> None:
    check_tensors("add_rms_norm", x=x, residual=residual, weight=weight)
    check_vectors("add_rms_norm", x, weight=weight)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(f"add_rms_norm: residual must be as x, {kind(x)}, got {kind(residual)}")


def _fake(x, weight, eps, offset):
    return fresh(x), x.new_empty(x.shape[:-1], dtype=torch.float32)


def _add_fake(x, residual, weight, eps, offset):
    y, rstd = _fake(x, weight, eps, offset)
    return y, torch.empty_like(y), rstd


def _rms_norm_setup(ctx, inputs, output):
    x, weight, _, ctx.offset = inputs
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, rstd)


def _rms_norm_derivative(ctx, grad_y, grad_rstd):
    if grad_y is None:
        return (None,) * 4
    grad_x, grad_weight = _rms_norm_backward(
        grad_y, None, *ctx.saved_tensors, ctx.offset, ctx.needs_input_grad[1]
    )
    return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None, None


def _add_rms_norm_setup(ctx, inputs, output):
    hidden, rstd = output[1:]
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, inputs[2], rstd)
    ctx.offset = inputs[4]


def _add_rms_norm_derivative(ctx, grad_y, grad_hidden, grad_rstd):
    if grad_y is None:
        return grad_hidden, grad_hidden, None, None, None
    grad_sum, grad_weight = _rms_norm_backward(
        grad_y, grad_hidden, *ctx.saved_tensors, ctx.offset, ctx.needs_input_grad[2]
    )
    return grad_sum, grad_sum, grad_weight if ctx.needs_input_grad[2] else None, None, None


_rms_norm = register(
    "rms_norm",
    check=_check,
    fake=_fake,
    backward=_rms_norm_derivative,
    setup_context=_rms_norm_setup,
)
_add_rms_norm = register(
    "add_rms_norm",
    check=_add_check,
    fake=_add_fake,
    backward=_add_rms_norm_derivative,
    setup_context=_add_rms_norm_setup,
)
_rms_norm_backward = register(
    "_rms_norm_backward",
    fake=lambda grad_y, grad_hidden, hidden, weight, rstd, offset, weight_gradient: (
        fresh(hidden),
        fresh(weight) if weight_gradient else weight.new_empty(0),
    ),
)
