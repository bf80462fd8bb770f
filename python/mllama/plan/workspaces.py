"""What operators on packed weights take beside their results: a tile, dequantized, as
csrc/ops/frozen_weight.h says.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from mllama.ops.lora_linear import DENSE
from mllama.ops.packed_layout import GROUP, LANES

TILE_ELEMENTS = {"cpu": 2**20, "cuda": 2**24}  # kTileElements of csrc/ops/unpack_*.h
Size = tuple[int, int, int]  # elements of a row or column, how many there are, a tile's are of


def workspace(operator: str, args: Sequence[Any], elements: int) -> int:
    """Bytes of the largest tile of a call.

    Args:
        operator: its name, "mllama::lora_linear".
        args: positional ones.
        elements: of a tile, one of TILE_ELEMENTS.
    """
    sizes = _SIZES.get(operator)
    if sizes is None:
        return 0
    return max((_elements(*size, elements) for size in sizes(*args)), default=0) * _itemsize(args)


def _elements(length: int, count: int, part: int, elements: int) -> int:
    step = max(elements // max(length, 1) // part, 1) * part
    return min(step, count) * length


def _itemsize(args: Sequence[Any]) -> int:
    first: torch.Tensor = args[0] if isinstance(args[0], torch.Tensor) else args[0][0]
    return first.itemsize


def _linear(x, weight, bias, out, packing) -> Iterator[Size]:
    yield x.shape[-1], out, LANES


def _linear_backward(grad_y, weight, width, packing) -> Iterator[Size]:
    yield grad_y.shape[-1], width, GROUP


def _lora(x, weights, lora_a, lora_b, biases, seeds, scales, dropouts, packings) -> Iterator[Size]:
    for b, packing in zip(lora_b, packings, strict=True):
        if packing != DENSE:
            yield x.shape[-1], b.shape[0], LANES


def _lora_backward(grad_ys, x, weights, *rest) -> Iterator[Size]:
    packings, x_gradient = rest[7:9]
    for grad_y, packing in zip(grad_ys, packings, strict=True):
        if packing != DENSE and x_gradient:
            yield grad_y.shape[-1], x.shape[-1], GROUP


_SIZES: dict[str, Callable[..., Iterator[Size]]] = {
    "mllama::dequantized_linear": _linear,
    "mllama::_dequantized_linear_backward": _linear_backward,
    "mllama::lora_linear": _lora,
    "mllama::_lora_linear_backward": _lora_backward,
}
