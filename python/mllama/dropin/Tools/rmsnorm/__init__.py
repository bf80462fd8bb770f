"""`Tools.rmsnorm`: the norm that adds a residual on its way."""

import torch

from mllama.nn.norm import RMSNorm

__all__ = ["FusedRMSNorm"]


class FusedRMSNorm(RMSNorm):
    """Root-mean-square norm with a residual added before it, in one pass.

    Args:
        dim: the last axis.
        eps: added to the mean of the squares.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """norm(x + residual), or norm(x): [..., dim] -> the same shape and dtype."""
        return super().forward(x) if residual is None else self.add(x, residual)[0]
