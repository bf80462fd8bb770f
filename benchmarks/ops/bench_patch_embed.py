"""patch_embed on SigLIP-base's images."""

from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case, both_directions
from mllama.ops import patch_embed

PEER = "torch.nn.functional.conv2d, flattened and transposed"


def cases() -> Iterator[Case]:
    """Every shape, dtype and direction; gradients of weight and bias, as training takes them."""
    for batch in shapes.VISION_BATCHES:
        for dtype in DTYPES:
            weight = torch.randn(shapes.VISION_HIDDEN, 3, shapes.PATCH, shapes.PATCH, dtype=dtype)
            bias = torch.randn(shapes.VISION_HIDDEN, dtype=dtype)
            pixels = torch.randn(batch, 3, shapes.IMAGE, shapes.IMAGE, dtype=dtype)
            flops = 2 * batch * shapes.PATCHES * weight.numel()
            yield from both_directions(
                shapes.label(pixels.shape),
                lambda weight, bias, pixels: patch_embed(pixels, weight, bias),
                _peer,
                (weight, bias, pixels),
                differentiable=2,
                forward_flops=flops,
                backward_flops=flops,
            )


def _peer(weight: torch.Tensor, bias: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    return (
        torch.nn.functional.conv2d(pixels, weight, bias, stride=weight.shape[-1])
        .flatten(2)
        .transpose(1, 2)
    )
