"""Root-mean-square normalisation (Zhang and Sennrich, 2019), alone and with the residual addition before it."""

import torch

from mllama.ops._dispatch import check_float, register, use_kernel


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) * weight over the last dimension.

    In Llama's order: the normalised x is rounded to its dtype before the product with weight.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        weight: [D], one of the same dtypes; float32 beside 16-bit x is accepted.
        eps: added to the mean of squares.

    Returns:
        [..., D] of x's dtype. Statistics are taken in float32.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: weight is not [D].
    """
    _check("rms_norm", x, weight)
    if use_kernel(x):
        return _rms_norm(x, weight, eps)[0]
    return reference(x, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rms_norm(hidden), hidden) where hidden = x + residual, of x's dtype; arguments as in `rms_norm`, residual as x.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: weight is not [D], or residual differs from x in shape or dtype.
    """
    _check("add_rms_norm", x, weight)
    check_float("add_rms_norm", residual=residual)
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ValueError(
            f"add_rms_norm: residual must be as x, {tuple(x.shape)} of {x.dtype}, got {tuple(residual.shape)} of {residual.dtype}"
        )
    if use_kernel(x):
        return _add_rms_norm(x, residual, weight, eps)[:2]
    return add_reference(x, residual, weight, eps)


def reference(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`rms_norm` in plain torch."""
    h = x.float()
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h.to(x.dtype) * weight).to(x.dtype)


def add_reference(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """`add_rms_norm` in plain torch."""
    hidden = x + residual
    return reference(hidden, weight, eps), hidden


def _check(op: str, x: torch.Tensor, weight: torch.Tensor) -> None:
    check_float(op, x=x, weight=weight)
    if x.dim() == 0 or weight.shape != x.shape[-1:]:
        size = x.shape[-1] if x.dim() else "D"
        raise ValueError(f"{op}: weight must be [{size}], the last size of x {tuple(x.shape)}, got {tuple(weight.shape)}")


def _statistic(x):
    return x.new_empty(x.shape[:-1], dtype=torch.float32)


def _rms_norm_setup(ctx, inputs, output):
    x, weight, _ = inputs
    rstd = output[1]
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, rstd)


def _rms_norm_derivative(ctx, grad_y, grad_rstd):
    if grad_y is None:
        return None, None, None
    grad_x, grad_weight = _rms_norm_backward(grad_y, None, *ctx.saved_tensors, ctx.needs_input_grad[1])
    return grad_x, grad_weight if ctx.needs_input_grad[1] else None, None


def _add_rms_norm_setup(ctx, inputs, output):
    hidden, rstd = output[1:]
    ctx.mark_non_differentiable(rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, inputs[2], rstd)


def _add_rms_norm_derivative(ctx, grad_y, grad_hidden, grad_rstd):
    if grad_y is None:
        return grad_hidden, grad_hidden, None, None
    grad_sum, grad_weight = _rms_norm_backward(grad_y, grad_hidden, *ctx.saved_tensors, ctx.needs_input_grad[2])
    return grad_sum, grad_sum, grad_weight if ctx.needs_input_grad[2] else None, None


_rms_norm = register(
    "rms_norm",
    fake=lambda x, weight, eps: (torch.empty_like(x, memory_format=torch.contiguous_format), _statistic(x)),
    backward=_rms_norm_derivative,
    setup_context=_rms_norm_setup,
)
_add_rms_norm = register(
    "add_rms_norm",
    fake=lambda x, residual, weight, eps: (*(torch.empty_like(x, memory_format=torch.contiguous_format) for _ in "yh"), _statistic(x)),
    backward=_add_rms_norm_derivative,
    setup_context=_add_rms_norm_setup,
)
_rms_norm_backward = register(
    "_rms_norm_backward",
    fake=lambda grad_y, grad_hidden, hidden, weight, rstd, weight_gradient: (
        torch.empty_like(hidden, memory_format=torch.contiguous_format),
        torch.empty_like(weight) if weight_gradient else weight.new_empty(0),
    ),
)
