"""Root-mean-square normalisation (Zhang and Sennrich, 2019), alone and with the residual addition before it."""

import torch

from mllama.ops._dispatch import check_float, check_value


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
    return reference(x, weight, eps)


def add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (rms_norm(hidden), hidden) where hidden = x + residual, of x's dtype; arguments as in `rms_norm`, residual as x.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: weight is not [D], or residual differs from x in shape or dtype.
    """
    _check("add_rms_norm", x, weight)
    check_float("add_rms_norm", residual=residual)
    check_value(
        residual.shape == x.shape and residual.dtype == x.dtype,
        f"add_rms_norm: residual must have x's shape {tuple(x.shape)} and dtype {x.dtype}, got {tuple(residual.shape)}, {residual.dtype}",
    )
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
    check_value(
        x.dim() >= 1 and weight.shape == x.shape[-1:],
        f"{op}: weight must be [{x.shape[-1] if x.dim() else 'D'}], the last size of x {tuple(x.shape)}, got {tuple(weight.shape)}",
    )
