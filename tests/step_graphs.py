"""Captured passes on a CPU: a double of `CudaStepGraph` that runs the function again, and holds it
to what a replayed graph can do.
"""

import contextlib
from collections.abc import Callable, Iterator
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

from mllama.runtime import decode_graph

# Operators that give the host a value, or take one from it other than as a number.
ON_THE_HOST = (
    "aten._local_scalar_dense",
    "aten.nonzero",
    "aten.equal",
    "aten.lift_fresh",
    "aten.masked_select",
)


class Recorder(TorchDispatchMode):
    """Writes down every operator with its numbers and tensors. A tensor that was there before is
    told by its place in memory, one that is made meanwhile by the operator that made it.

    Attributes:
        calls: the operators, in order.
    """

    def __init__(self):
        super().__init__()
        self.calls: list[tuple] = []
        self._makers: dict[int, int] = {}  # by the storage's address

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name, kwargs = str(func), kwargs or {}
        assert not name.startswith(ON_THE_HOST), f"{name} reads or writes a value on the host"
        call = name, tree_map(self._describe, (args, kwargs))
        result = func(*args, **kwargs)
        known = {_place(x) for x in _tensors((args, kwargs))}
        for made in _tensors(result):
            if _place(made) not in known:
                self._makers[_place(made)] = len(self.calls)
        self.calls.append(call)
        return result

    def _describe(self, x):
        if not isinstance(x, torch.Tensor):
            return x
        maker = self._makers.get(_place(x))
        place = x.data_ptr() if maker is None else (maker, x.storage_offset())
        return place, tuple(x.shape), x.stride(), x.dtype


def _place(x: torch.Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _tensors(tree) -> list[torch.Tensor]:
    return [x for x in tree_flatten(tree)[0] if isinstance(x, torch.Tensor)]


class RecordedGraph:
    """`CudaStepGraph` on a CPU. A replay fails where it is not the same operators on the same
    numbers and places in memory: a graph would go on with the old ones.
    """

    def __init__(self, run: Callable[[], None], device: torch.device):
        self._run, self._calls = run, None
        self.replay()

    def replay(self) -> None:
        with Recorder() as recorder:
            self._run()
        self._calls = self._calls or recorder.calls
        assert recorder.calls == self._calls


class Counted:
    """Numbers of captures and of replays."""

    def __init__(self):
        self.captures = self.replays = 0


@contextlib.contextmanager
def captured_passes() -> Iterator[Counted]:
    """Sessions capture passes on a CPU meanwhile."""
    counted = Counted()

    class Graph(RecordedGraph):
        def __init__(self, run, device):
            counted.captures += 1
            super().__init__(run, device)
            counted.replays = counted.replays - 1  # the capture's own

        def replay(self):
            counted.replays += 1
            super().replay()

    with mock.patch.object(decode_graph, "graph_class", lambda device: Graph):
        yield counted
