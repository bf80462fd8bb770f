"""Normalization layers on top of the operators."""

import torch
from torch import nn

from mllama.nn.plain import is_plain
from mllama.ops.layer_norm import layer_norm
from mllama.ops.rms_norm import add_rms_norm, rms_norm


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, scaled by offset + weight (initially 1).

    Offset 0 is Llama's order (normalize in float32, cast, scale); 1 is Gemma's (scale in float32,
    cast last).
    """

    def __init__(self, size: int, eps: float = 1e-6, offset: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((size,), 1.0 - offset))
        self.eps = eps
        self.offset = offset

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """[..., size] -> the same shape and dtype: the norm of x, or of x + residual."""
        if residual is not None:
            return self.add(x, residual)[0]
        return rms_norm(x, self.weight, self.eps, self.offset)

    def add(self, x: torch.Tensor, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(norm(x + residual), x + residual) in one pass, in the residual's dtype; under autocast
        x has a smaller one.
        """
        return add_rms_norm(x.to(residual.dtype), residual, self.weight, self.eps, self.offset)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}" + (
            f", offset={self.offset}" if self.offset else ""
        )


def add_and_norm(
    norm: nn.Module, x: torch.Tensor, residual: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(norm(x + residual), x + residual): in one pass, or by calling a norm that has hooks or is
    another module.
    """
    if is_plain(norm, RMSNorm):
        return norm.add(x, residual)
    total = x.to(residual.dtype) + residual
    return norm(total), total


class LayerNorm(nn.Module):
    """Layer norm over the last axis, with weight and bias."""

    def __init__(self, size: int, eps: float = 1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size))
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., size] -> the same shape and dtype."""
        return layer_norm(x, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
