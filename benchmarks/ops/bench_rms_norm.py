"""rms_norm on Llama-3.2-1B's hidden states, and in Gemma's form (1 + weight) on the same
sizes.
"""

from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case, both_directions
from mllama.ops import rms_norm

PEER = "torch.nn.functional.rms_norm (with 1 + weight for Gemma's form)"


def cases() -> Iterator[Case]:
    """Every shape, dtype and direction."""
    for shape in shapes.text(shapes.HIDDEN):
        for dtype in DTYPES:
            x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1:], dtype=dtype)
            size = x.numel() * x.element_size()
            for label, ours, peer in (
                (shapes.label(shape), _llama, _peer),
                (f"gemma {shapes.label(shape)}", _gemma, _gemma_peer),
            ):
                yield from both_directions(
                    label,
                    ours,
                    peer,
                    (x, weight),
                    differentiable=2,
                    forward_bytes=2 * size,
                    backward_bytes=3 * size,
                )


def _llama(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight, 1e-5)


def _gemma(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return rms_norm(x, weight, 1e-5, offset=1.0)


def _peer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-5)


def _gemma_peer(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return _peer(x, 1 + weight)
