"""What every operator file shares: the choice between kernel and reference, and checks of what a caller passed."""

import torch

from mllama import _ext

_EXTENSION = _ext.load()
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_kernel(x: torch.Tensor) -> bool:
    """True when the compiled kernel serves this tensor: it lives on the CPU and operators are not disabled."""
    return _EXTENSION is not None and x.device.type == "cpu"


def check_float(op: str, **tensors: torch.Tensor | None) -> None:
    """Raise TypeError unless every tensor given is a float32, bfloat16 or float16 torch.Tensor; None is passed over."""
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(f"{op}: {name} must be float32, bfloat16 or float16, got {str(tensor.dtype).removeprefix('torch.')}")


def check_value(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def no_second_derivative(op: str):
    """An autograd formula for a backward operator: it raises, since a missing one would give silently wrong second derivatives."""

    def backward(ctx, *grads):
        raise NotImplementedError(f"mllama::{op} has no second derivative; differentiate {op.removeprefix('_')} once, or set MLLAMA_DISABLE_OPS=1")

    return backward
