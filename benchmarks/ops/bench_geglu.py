"""geglu on Llama-3.2-1B's feed-forward width."""

from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case, both_directions
from mllama.ops import geglu

PEER = 'torch.nn.functional.gelu(gate, approximate="tanh") * up'


def cases() -> Iterator[Case]:
    """Every shape, dtype and direction."""
    for shape in shapes.text(shapes.FFN):
        for dtype in DTYPES:
            gate, up = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
            size = gate.numel() * gate.element_size()
            yield from both_directions(
                shapes.label(shape),
                geglu,
                lambda gate, up: torch.nn.functional.gelu(gate, approximate="tanh") * up,
                (gate, up),
                differentiable=2,
                forward_bytes=3 * size,
                backward_bytes=5 * size,
            )
