"""Rotary position tables, computed once per forward pass and shared by the layers."""

import torch
from torch import nn

from mllama.ops.rope import rope_frequencies, rope_tables


class RotaryEmbedding(nn.Module):
    """Position ids -> (cos, sin).

    The frequencies are a plain attribute, not a buffer: they survive building on the meta device,
    and stay float32 under `.to(bfloat16)`.

    Args:
        head_dim: size of a head.
        parameters: transformers' `rope_parameters`: `rope_theta`, `rope_type` (default, linear,
            llama3) and that type's own fields.
    """

    def __init__(self, head_dim: int, parameters: dict):
        super().__init__()
        self.frequencies = rope_frequencies(head_dim, scaling=parameters, device="cpu")

    def _apply(self, fn, recurse: bool = True):
        device = fn(torch.empty(0, device=self.frequencies.device)).device
        if device.type != "meta":
            self.frequencies = self.frequencies.to(device)
        return super()._apply(fn, recurse)

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """position_ids: int [B or 1, T] -> cos and sin, float32 [B or 1, T, head_dim / 2]."""
        return rope_tables(position_ids, self.frequencies.to(position_ids.device))
