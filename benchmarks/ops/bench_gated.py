"""swiglu and geglu on Llama-3.2-1B's feed-forward width."""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import gelu, silu

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case, both_directions
from mllama.ops import geglu, swiglu

PEER = 'torch.nn.functional.silu(gate) * up, and gelu(gate, approximate="tanh") * up'
ACTIVATIONS = {swiglu: silu, geglu: partial(gelu, approximate="tanh")}


def cases() -> Iterator[Case]:
    """Every activation, shape, dtype and direction."""
    for gated, activation in ACTIVATIONS.items():
        for shape in shapes.text(shapes.FFN):
            for dtype in DTYPES:
                gate, up = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
                size = gate.numel() * gate.element_size()
                yield from both_directions(
                    f"{gated.__name__} {shapes.label(shape)}",
                    gated,
                    lambda gate, up, activation=activation: activation(gate) * up,
                    (gate, up),
                    differentiable=2,
                    forward_bytes=3 * size,
                    backward_bytes=5 * size,
                )
