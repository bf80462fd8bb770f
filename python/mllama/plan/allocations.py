"""Counts the bytes of tensors by kind while torch computes, real ones and fake ones alike."""

import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

WORKSPACE = "tiles of packed weights"


class AllocationTracker(TorchDispatchMode):
    """Counts the storages that are alive, those of operators' results among them, from their first
    use to their end.

    Args:
        vocabulary: floating tensors with this last dimension are of kind "logits".
        workspace: bytes that an operator of this name takes beside its results, by its arguments;
            they are of kind WORKSPACE. Default: none.

    Attributes:
        live: bytes by kind, now.
        peak: bytes by kind when their sum was highest.
    """

    def __init__(
        self,
        vocabulary: int | None = None,
        workspace: Callable[[str, Sequence[Any]], int] = lambda operator, args: 0,
    ):
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self._vocabulary, self._workspace = vocabulary, workspace
        self._known: dict[int, tuple[str, int]] = {}  # storage -> kind, bytes

    def note(self, tensor: torch.Tensor, kind: str) -> None:
        """Count a tensor, or what was counted of it already, as this kind."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            before, size = self._known[key]
            self.live[before] -= size
        else:
            size = storage.nbytes()
            weakref.finalize(storage, self._drop, key)
        self._known[key] = kind, size
        self._add(kind, size)

    def _add(self, kind: str, size: int) -> None:
        self.live[kind] += size
        if self.live.total() > self.peak.total():
            self.peak = self.live.copy()

    def _drop(self, key: int) -> None:
        kind, size = self._known.pop(key)
        self.live[kind] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and self._is_new(tensor):
                self.note(tensor, self._kind_of(tensor))
        if size := self._workspace(func.name().partition(".")[0], args):
            self._add(WORKSPACE, size)
            self.live[WORKSPACE] -= size
        return result

    def _is_new(self, tensor: torch.Tensor) -> bool:
        return tensor.untyped_storage()._cdata not in self._known

    def _kind_of(self, tensor: torch.Tensor) -> str:
        wide = tensor.dim() > 1 and tensor.is_floating_point()
        return "logits" if wide and tensor.shape[-1] == self._vocabulary else "activations"
