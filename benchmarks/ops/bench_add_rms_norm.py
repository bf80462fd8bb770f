"""add_rms_norm on Llama-3.2-1B's hidden states."""

from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case, both_directions
from mllama.ops import add_rms_norm

PEER = "x + residual, then torch.nn.functional.rms_norm"


def cases() -> Iterator[Case]:
    """Every shape, dtype and direction."""
    for shape in shapes.text(shapes.HIDDEN):
        for dtype in DTYPES:
            x, residual = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
            weight = torch.randn(shape[-1:], dtype=dtype)
            size = x.numel() * x.element_size()
            yield from both_directions(
                shapes.label(shape),
                lambda x, residual, weight: add_rms_norm(x, residual, weight, 1e-5),
                _peer,
                (x, residual, weight),
                differentiable=3,
                forward_bytes=4 * size,
                backward_bytes=4 * size,
            )


def _peer(
    x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    hidden = x + residual
    return torch.nn.functional.rms_norm(hidden, hidden.shape[-1:], weight, 1e-5), hidden
