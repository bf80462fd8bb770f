"""lora_linear on the feed-forward projections of Llama-3.2-1B, frozen, with float32 adapters of
rank 16.
"""

from collections.abc import Iterator

import torch

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case, both_directions
from mllama.ops import LoraLayer, lora_linear, lora_linears

PEER = "PEFT's formula: linear(x) + lora_b(lora_a(dropout(x))) * scale in eager torch"
RANK, SCALE, DROPOUT = 16, 2.0, 0.1


def cases() -> Iterator[Case]:
    """Both projections, every length and dtype, without and (where training uses it) with dropout;
    gradients of x and the adapters.
    """
    for width, out in ((shapes.HIDDEN, shapes.FFN), (shapes.FFN, shapes.HIDDEN)):
        for shape in shapes.text(width):
            for dtype in DTYPES:
                yield from _cases(shape, out, dtype, 0.0)
    for dtype in DTYPES:
        yield _cases(shapes.text(shapes.HIDDEN)[-1], shapes.FFN, dtype, DROPOUT)[1]
        yield from _group(shapes.text(shapes.HIDDEN)[-1], dtype)


def _group(shape: tuple[int, ...], dtype: torch.dtype) -> list[Case]:
    """gate and up as one operator, against PEFT's formula for each."""
    width, rows, out = shape[-1], shape[0] * shape[1], shapes.FFN
    x = torch.randn(shape, dtype=dtype)
    adapters = [t for _ in range(2) for t in (torch.randn(RANK, width), torch.randn(out, RANK))]
    weights = [torch.randn(out, width, dtype=dtype) for _ in range(2)]

    def ours(x, *tensors):
        layers = [LoraLayer(weights[i], *tensors[2 * i : 2 * i + 2], None, SCALE) for i in range(2)]
        return tuple(lora_linears(x, layers))

    def peer(x, *tensors):
        return tuple(_peer(x, *tensors[2 * i : 2 * i + 2], weights[i], 0.0) for i in range(2))

    flops, update_flops = 4 * rows * width * out, 4 * rows * RANK * (width + out)
    return both_directions(
        f"{shapes.label(shape)} to 2 x {out}",
        ours,
        peer,
        (x, *adapters),
        differentiable=5,
        forward_flops=flops + update_flops,
        backward_flops=flops + 2 * update_flops,
    )


def _cases(shape: tuple[int, ...], out: int, dtype: torch.dtype, dropout: float) -> list[Case]:
    width, rows = shape[-1], shape[0] * shape[1]
    x, weight = torch.randn(shape, dtype=dtype), torch.randn(out, width, dtype=dtype)
    a, b = torch.randn(RANK, width), torch.randn(out, RANK)
    size = (
        weight.numel() * weight.element_size() if rows == 1 else 0
    )  # reading the weight then dominates
    flops, update_flops = 2 * rows * weight.numel(), 2 * rows * RANK * (width + out)
    return both_directions(
        f"{shapes.label(shape)} to {out}" + (f", dropout {dropout}" if dropout else ""),
        lambda x, a, b, weight: lora_linear(x, weight, a, b, scale=SCALE, dropout=dropout),
        lambda x, a, b, weight: _peer(x, a, b, weight, dropout),
        (x, a, b, weight),
        differentiable=3,
        forward_bytes=size,
        backward_bytes=size,
        forward_flops=flops + update_flops,
        backward_flops=flops + 2 * update_flops,
    )


def _peer(
    x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, weight: torch.Tensor, dropout: float
) -> torch.Tensor:
    linear = torch.nn.functional.linear
    update = torch.nn.functional.dropout(x.to(a.dtype), dropout)
    return (linear(x, weight) + linear(linear(update, a), b) * SCALE).to(x.dtype)
