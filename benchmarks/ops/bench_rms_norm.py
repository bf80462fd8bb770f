"""rms_norm on Llama-3.2-1B's hidden states."""

from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case, both_directions
from mllama.ops import rms_norm

PEER = "torch.nn.functional.rms_norm"


def cases() -> Iterator[Case]:
    """Every shape, dtype and direction."""
    for shape in shapes.text(shapes.HIDDEN):
        for dtype in DTYPES:
            x, weight = torch.randn(shape, dtype=dtype), torch.randn(shape[-1:], dtype=dtype)
            size = x.numel() * x.element_size()
            yield from both_directions(
                shapes.label(shape),
                lambda x, weight: rms_norm(x, weight, 1e-5),
                lambda x, weight: torch.nn.functional.rms_norm(x, x.shape[-1:], weight, 1e-5),
                (x, weight),
                differentiable=2,
                forward_bytes=2 * size,
                backward_bytes=3 * size,
            )
