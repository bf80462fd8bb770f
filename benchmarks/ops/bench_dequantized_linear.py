"""dequantized_linear on the feed-forward projections of Llama-3.2-1B, as training calls it."""

from collections.abc import Iterator

import torch
from torch.nn.functional import linear

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case, both_directions
from mllama.ops import dequantized_linear, pack_weight

PEER = "torch.nn.functional.linear on the dense weight, in x's dtype"
ROWS = 512
PACKINGS = ("int8", "int4", "bf16", "q6_k")


def cases() -> Iterator[Case]:
    """Both projections, each dtype of x; gradients of x."""
    for width, out in ((shapes.HIDDEN, shapes.FFN), (shapes.FFN, shapes.HIDDEN)):
        weight, x = torch.randn(out, width) / 50, torch.randn(ROWS, width)
        for packing in PACKINGS:
            packed = pack_weight(weight, packing)
            for dtype in DTYPES:
                yield from _cases(x.to(dtype), packed, weight.to(dtype), packing)


def _cases(x: torch.Tensor, packed: torch.Tensor, weight: torch.Tensor, packing: str) -> list[Case]:
    out, width = weight.shape
    flops = 2 * ROWS * out * width
    return both_directions(
        f"{packing} {ROWS}x{width}x{out}",
        lambda x, packed: dequantized_linear(x, packed, out_features=out, packing=packing),
        linear,
        (x, packed),
        peer_inputs=(x, weight),
        differentiable=1,
        forward_flops=flops,
        backward_flops=flops,
    )
