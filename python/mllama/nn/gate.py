"""Gated residual addition."""

import torch


def gated_add(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """x + tanh(gate) * y in x's dtype, the tanh in float32.

    Args:
        x: the residual stream, of any shape.
        y: the residual branch, of x's shape.
        gate: [1], learned.
    """
    return torch.addcmul(x, y.to(x.dtype), gate.float().tanh().to(x.dtype))
