"""Linear layers with a low-rank update beside them, as `decode_step` and training read them."""

import functools
import itertools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
from torch import nn

from mllama.nn.plain import is_plain
from mllama.ops.lora_linear import LoraLayer, lora_linears

_counter = itertools.count(1)
_state = 0


class LowRank(NamedTuple):
    """The update scale * (x a') b': a [rank, in_features], b [out_features, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class AdaptedLinear(nn.Module):
    """A layer `linear` and a low-rank update.

    Setting an attribute of one is noted, so that who has read its parts can see that they may be
    others now. Values of a and b may be written in place: readers share their memory.
    """

    linear: Any  # nn.Linear, or a layer like it

    def update(self) -> LowRank | None:
        """The update, None where it is disabled.

        Raises:
            ValueError: the layer does not compute `linear(x)` plus such an update.
        """
        raise NotImplementedError

    def operands(self, x: torch.Tensor) -> LoraLayer | None:
        """What `lora_linears` computes forward(x) from; None where forward does something else."""
        raise NotImplementedError

    def __setattr__(self, name: str, value: object) -> None:
        note_change()
        super().__setattr__(name, value)


def linears(x: torch.Tensor, *layers: nn.Module) -> list[torch.Tensor]:
    """The output of each layer of x, by one operator where all are plain and have adapters."""
    if torch.is_grad_enabled():
        plain = [
            layer.operands(x)
            if isinstance(layer, AdaptedLinear) and is_plain(layer, type(layer))
            else None
            for layer in layers
        ]
        if one_group := _group(plain):
            return lora_linears(x, one_group)
    return [layer(x) for layer in layers]


def _group(layers: list[LoraLayer | None]) -> list[LoraLayer] | None:
    """The layers, if the operator takes them together."""
    found = [layer for layer in layers if layer is not None]
    kinds = {(layer.lora_a.dtype, layer.bias is None, layer.weight.device) for layer in found}
    return found if len(found) == len(layers) and len(kinds) == 1 else None


def note_change() -> None:
    """Note a change that sets no attribute of an adapted layer: values from a file, packing."""
    global _state
    _state = next(_counter)


def adapter_state() -> int:
    """A number that is another one after every change of adapted layers, in all models of this
    process.
    """
    return _state


def name_state(before: int, change: Hashable) -> int:
    """Give the state after a change the number that it had when the same change was made in the
    same state before, for those who kept what they computed then.
    """
    global _state
    _state = _number(before, change)
    return _state


def return_to_state(number: int) -> None:
    """Say that all changes since a state were undone."""
    global _state
    _state = number


@functools.lru_cache(maxsize=256)
def _number(before: int, change: Hashable) -> int:
    return next(_counter)
