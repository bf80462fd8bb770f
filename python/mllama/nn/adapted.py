"""Linear layers with a low-rank update beside them, as `decode_step` reads them."""

import functools
import itertools
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch

from mllama.nn.plain import RecomputingLinear

_counter = itertools.count(1)
_state = 0


class LowRank(NamedTuple):
    """The update scale * (x a') b': a [rank, in_features], b [out_features, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class AdaptedLinear(RecomputingLinear):
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

    def __setattr__(self, name: str, value: object) -> None:
        note_change()
        super().__setattr__(name, value)


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
