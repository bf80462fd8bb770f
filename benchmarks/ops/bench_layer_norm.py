"""layer_norm on SigLIP-base's hidden states."""

from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case, both_directions
from mllama.ops import layer_norm

PEER = "torch.nn.functional.layer_norm"


def cases() -> Iterator[Case]:
    """Every shape, dtype and direction."""
    for shape in shapes.vision(shapes.VISION_HIDDEN):
        for dtype in DTYPES:
            x = torch.randn(shape, dtype=dtype)
            weight, bias = torch.randn(2, shape[-1], dtype=dtype)
            size = x.numel() * x.element_size()
            yield from both_directions(
                shapes.label(shape),
                lambda x, weight, bias: layer_norm(x, weight, bias, 1e-6),
                lambda x, weight, bias: torch.nn.functional.layer_norm(
                    x, x.shape[-1:], weight, bias, 1e-6
                ),
                (x, weight, bias),
                differentiable=3,
                forward_bytes=2 * size,
                backward_bytes=3 * size,
            )
