"""Activations that are recomputed in the backward pass instead of saved.

Norms, activations and rotations are cheap, and their own backward passes save what they were
computed from. They note here how that was. An operator that needs such a tensor in its backward
pass saves those inputs in its place: the same bits, computed again.

A note is about a tensor object: a view or a copy has none, and is saved as it is.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary


class Note(NamedTuple):
    """How a tensor was computed: function(*inputs)."""

    function: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    versions: tuple[int, ...]  # of the tensor and of the inputs: values may be written in place


_NOTES = WeakTensorKeyDictionary()


def recomputable(
    result: torch.Tensor, function: Callable[..., torch.Tensor], *inputs: torch.Tensor
) -> torch.Tensor:
    """Note that result is function(*inputs), bit for bit, and return it.

    Args:
        result: noted if it requires a gradient.
        function: cheap, and saves `inputs` for its own backward pass.
        inputs: all tensors that the function reads.
    """
    if result.requires_grad and not torch.compiler.is_compiling():
        _NOTES[result] = Note(function, inputs, _versions(result, *inputs))
    return result


def note_of(x: torch.Tensor) -> Note | None:
    """The note about a tensor, if it still holds."""
    if not x.requires_grad or torch.compiler.is_compiling():
        return None
    note = _NOTES.get(x)
    return note if note and note.versions == _versions(x, *note.inputs) else None


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """x.to(dtype), noted if x is."""
    note = note_of(x)
    result = x.to(dtype)
    if note is None or result is x:
        return result
    return recomputable(result, lambda *inputs: note.function(*inputs).to(dtype), *note.inputs)


class Saved(NamedTuple):
    """What an operator keeps of a tensor for its backward pass: the tensors go to
    `ctx.save_for_backward`, the function to ctx.
    """

    function: Callable[..., torch.Tensor] | None
    tensors: tuple[torch.Tensor, ...]

    @classmethod
    def of(cls, x: torch.Tensor) -> "Saved":
        """x itself, or what it can be computed from."""
        note = note_of(x)
        return cls(None, (x,)) if note is None else cls(note.function, note.inputs)


def restored(
    function: Callable[..., torch.Tensor] | None, tensors: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    """The tensor that `Saved` was of."""
    return tensors[0] if function is None else function(*tensors)


def _versions(*tensors: torch.Tensor) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)
