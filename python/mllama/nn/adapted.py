"""Linear layers with a low-rank update beside them, as `decode_step` reads them."""

from typing import Any, NamedTuple

import torch

from mllama.nn.plain import RecomputingLinear

_changes = 0


class LowRank(NamedTuple):
    """The update scale * (x a') b': a [rank, in_features], b [out_features, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float


class AdaptedLinear(RecomputingLinear):
    """A layer `linear` and a low-rank update.

    Setting an attribute of one is counted, so that who has read its parts can see that they may be
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
    """Count a change that sets no attribute of an adapted layer: values from a file, packing."""
    global _changes
    _changes += 1


def count_changes() -> int:
    """How often adapted layers were changed, in all models of this process."""
    return _changes
