"""packed_linear on Llama-3.2-1B's widest weight, for one row, a few, and a prompt."""

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import linear

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case
from mllama.ops import pack_weight, packed_linear
from mllama.ops.packed_layout import PACKINGS, packed_bytes

PEER = "torch.nn.functional.linear on the dense weight, in x's dtype"
ROWS = (1, 8, 256)
COPIES = 8  # of the weight, one after the other: no cache holds them all


def cases() -> Iterator[Case]:
    """Every format, number of rows and dtype of x. GB/s are the packed weight's."""
    for dtype in DTYPES:
        dense = [torch.randn(shapes.FFN, shapes.HIDDEN).div_(50).to(dtype) for _ in range(COPIES)]
        for packing in PACKINGS:
            packed = [pack_weight(weight, packing) for weight in dense]
            for rows in ROWS:
                x = torch.randn(rows, shapes.HIDDEN, dtype=dtype)
                yield Case(
                    f"{packing} {rows}x{shapes.HIDDEN}x{shapes.FFN}",
                    dtype,
                    "forward",
                    _in_turn(packed, x, packing),
                    _in_turn(dense, x),
                    bytes=packed_bytes(shapes.FFN, shapes.HIDDEN, packing),
                    flops=2 * rows * shapes.HIDDEN * shapes.FFN,
                )


def _in_turn(weights: list[torch.Tensor], x: torch.Tensor, packing: str = "") -> Callable:
    """One product per call, with the next weight each time."""
    turn = 0

    def run():
        nonlocal turn
        turn = (turn + 1) % COPIES
        with torch.inference_mode():
            if packing:
                return packed_linear(x, weights[turn], out_features=shapes.FFN, packing=packing)
            return linear(x, weights[turn])

    return run
