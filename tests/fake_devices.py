"""CUDA devices that are not there. FakeTensorMode has the devices, dtypes and shapes of tensors and
no values: reading one on the host raises.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

from mllama import _ext
from mllama.ops import _dispatch

DEVICES = ["cuda:0", "cuda:1"]


class _WithoutGuards(TorchFunctionMode):
    """Copies and indexing by operators: Python's methods set the current device, which CPU builds
    of torch cannot. And no initialization of weights.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        name = getattr(func, "__name__", "")
        if name == "__getitem__":
            return _indexed(*args)
        if name == "__setitem__":
            return torch.ops.aten.copy_(_indexed(*args[:2]), args[2])
        if name == "copy_":
            return torch.ops.aten.copy_(*args)
        if name == "__invert__":
            return torch.ops.aten.bitwise_not(*args)
        if name == "__int__":
            return args[0].item()
        return func(*args, **kwargs or {})


def _indexed(x: torch.Tensor, index: Any) -> torch.Tensor:
    index, dim = index if isinstance(index, tuple) else (index,), 0
    for place, one in enumerate(index):
        if one is None:
            x, dim = x.unsqueeze(dim), dim + 1
        elif one is ...:
            dim = x.dim() - sum(rest is not None for rest in index[place + 1 :])
        elif isinstance(one, slice):
            x, dim = torch.ops.aten.slice(x, dim, one.start, one.stop, one.step or 1), dim + 1
        elif isinstance(one, int):
            x = x.select(dim, one)
        else:
            x, dim = torch.ops.aten.index(x, [*[None] * dim, one]), dim + 1
    return x


@contextlib.contextmanager
def fake_cuda(kernels: bool = False) -> Iterator[None]:
    """Tensors are fake meanwhile.

    Args:
        kernels: whether operators are called as in a build with CUDA kernels, not their references.
    """
    names = {"decode", *_ext.load().build_info()["operators"].split()} if kernels else set()
    with (
        mock.patch.object(_dispatch, "_CUDA_OPERATORS", names),
        FakeTensorMode(allow_non_fake_inputs=True),
        _WithoutGuards(),
    ):
        yield


class OneDevice(TorchDispatchMode):
    """Refuses operators on tensors of several devices, such as copies from the host, which fail
    during a capture or are captured with the values of then.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        tensors = (x for x in tree_flatten((args, kwargs, result))[0] if _is_tensor(x))
        assert len({x.device for x in tensors}) <= 1, f"{func} of several devices"
        return result


def _is_tensor(x: Any) -> bool:
    return isinstance(x, torch.Tensor)
