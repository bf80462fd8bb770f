"""Shared by all operator files: dispatch to kernel or reference, registration, argument checks.

A public function checks numbers itself. Tensors are checked by the operator's `check`, which runs
before the reference, in the fake, and after the kernel rejected its arguments. So a call that
succeeds pays nothing, and every path raises the same message.
"""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from mllama import _ext

_EXTENSION = _ext.load()
_CUDA_OPERATORS = frozenset(_EXTENSION.build_info()["cuda_operators"].split() if _EXTENSION else ())
if hasattr(os, "register_at_fork"):
    # GNU OpenMP takes the parent's threads for its own in a forked process, and waits for them
    # forever: in torch's operators too. core/threads.h does the same for ours.
    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_ONCE = "mllama's operators can be differentiated once"


def use_kernel(operator: str, x: torch.Tensor) -> bool:
    """Whether operators are enabled and have a kernel for x's device; the name is that of the
    operator's file in csrc/ops.
    """
    return isinstance(x, torch.Tensor) and has_kernel(operator, x.device)


def has_kernel(operator: str, device: torch.device) -> bool:
    """`use_kernel` of tensors on a device."""
    if _EXTENSION is None:
        return False
    return device.type == "cpu" or (device.type == "cuda" and operator in _CUDA_OPERATORS)


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype of autocast on x's device, None if it is off. The meta device has no autocast, and
    asking raises; a device's support cannot be queried inside a graph compiled by torch 2.11.
    """
    device = x.device.type if isinstance(x, torch.Tensor) else "meta"
    return (
        torch.get_autocast_dtype(device)
        if device != "meta" and torch.is_autocast_enabled(device)
        else None
    )


def exact(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Context that disables autocast on x's device for a reference's matrix products."""
    return (
        contextlib.nullcontext()
        if autocast_dtype(x) is None
        else torch.autocast(x.device.type, enabled=False)
    )


def check_tensors(op: str, *, optional: tuple[str, ...] = (), **tensors: Any) -> None:
    """Raise TypeError unless all are float32, bfloat16 or float16 tensors (`optional` ones may be
    None), ValueError unless they are on one device.
    """
    for name, tensor in tensors.items():
        if tensor is None and name in optional:
            continue
        check_tensor(op, name, tensor)
        if tensor.dtype not in FLOAT_DTYPES:
            raise TypeError(
                f"{op}: {name} must be float32, bfloat16 or float16, got {dtype_name(tensor)}"
            )
    first, *others = tensors
    for name in others:
        if tensors[name] is not None:
            check_device(op, name, tensors[name], first, tensors[first])


def check_tensor(op: str, name: str, tensor: Any) -> None:
    """Raise TypeError unless it is a tensor."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")


def check_dtype(op: str, name: str, tensor: Any, dtype: torch.dtype) -> None:
    """Raise TypeError unless it is a tensor of this dtype."""
    check_tensor(op, name, tensor)
    if tensor.dtype != dtype:
        wanted = str(dtype).removeprefix("torch.")
        raise TypeError(f"{op}: {name} must be {wanted}, got {dtype_name(tensor)}")


def check_vectors(op: str, x: torch.Tensor, **vectors: torch.Tensor) -> None:
    """Raise ValueError unless x has a dimension, and each vector the size of its last one."""
    if x.dim() == 0:
        raise ValueError(f"{op}: x must have at least one dimension")
    for name, vector in vectors.items():
        if vector.shape != x.shape[-1:]:
            raise ValueError(
                f"{op}: {name} must be [{x.shape[-1]}], the last size of x {list(x.shape)}, "
                f"got {list(vector.shape)}"
            )


def check_device(op: str, name: str, tensor, first: str, home) -> None:
    """Raise ValueError unless the tensor is on the device of `home`, the argument named `first`."""
    if tensor.device != home.device:
        raise ValueError(
            f"{op}: {name} is on {tensor.device}, {first} on {home.device}; "
            "all must be on one device"
        )


def check_value(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_number(op: str, name: str, value: Any, wanted: str = "a number") -> None:
    """Raise TypeError unless it is an int or a float."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{op}: {name} must be {wanted}, got {type(value).__name__}")


def check_eps(op: str, eps: float) -> None:
    """Raise TypeError unless eps is a number, ValueError unless it is finite and not negative."""
    check_number(op, "eps", eps)
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")


def dtype_name(x: torch.Tensor) -> str:
    """The dtype without "torch.", such as float32."""
    return str(x.dtype).removeprefix("torch.")


def kind(x: torch.Tensor) -> str:
    """Shape and dtype for a message, such as "[2, 3] of float32"."""
    return f"{list(x.shape)} of {dtype_name(x)}"


def fresh(like: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor of like's shape and dtype, as kernels return; for fakes."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def register(
    name: str,
    *,
    fake: Callable,
    check: Callable | None = None,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    why: str = _ONCE,
) -> Any:
    """Register fake and autograd formula of the compiled operator `mllama::name`; return the
    function that calls it, or None if operators are disabled.

    `check` takes the operator's arguments and raises for invalid ones. Without `backward` the
    operator is itself a derivative, or has none: differentiating it raises and says `why`, because
    a missing formula would give wrong derivatives silently.
    """
    if _EXTENSION is None:
        return None
    if not hasattr(torch.ops.mllama, name):
        raise _ext.unavailable(
            f"mllama._C was built from other sources than these: it lacks the operator {name}"
        )
    fake = fake if check is None else _checked(check, fake)
    for qualified in (f"mllama::{name}", f"mllama::{name}.kernel"):
        torch.library.register_fake(qualified, fake)
    if backward is None:
        backward, setup_context = _no_derivative(name, why), None
    torch.library.register_autograd(f"mllama::{name}", backward, setup_context=setup_context)
    return _caller(name, check)


def _checked(check: Callable, fake: Callable) -> Callable:
    """A fake that checks its arguments. A call that mixes meta and real tensors runs it too, and
    its result would be uninitialized memory.
    """

    def checked(*arguments):
        check(*arguments)
        return fake(*arguments)

    return checked


def _caller(name: str, check: Callable | None) -> Callable:
    """Call the operator, raising the errors of its check in place of the kernel's. Where no
    gradient is wanted, the overload without a formula saves 5 µs, half of a call for one token.
    """
    packet = getattr(torch.ops.mllama, name)
    default, kernel = packet.default, packet.kernel

    def call(*arguments):
        if torch.compiler.is_compiling():
            return default(*arguments)
        _refuse_tangents(name, arguments)
        wants_gradient = torch.is_grad_enabled() and any(
            tensor.requires_grad for tensor in _tensors(arguments)
        )
        run = default if wants_gradient else kernel
        try:
            return run(*arguments)
        except (RuntimeError, TypeError, ValueError) as error:
            refused = error
        if check is not None:
            check(*arguments)
        # std::invalid_argument arrives as ValueError up to torch 2.14 only.
        if type(refused) is RuntimeError and str(refused).startswith(f"{name}: "):
            raise ValueError(str(refused)) from None
        raise refused

    return call


def _tensors(arguments: Iterable[Any]) -> Iterator[torch.Tensor]:
    """Those among an operator's arguments, in lists as well."""
    for value in arguments:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, list):
            yield from _tensors(value)


def _refuse_tangents(name: str, arguments: tuple) -> None:
    """Reject forward-mode tangents: there is no formula, and torch would use zero silently."""
    for tensor in _tensors(arguments):
        if forward_ad.unpack_dual(tensor).tangent is not None:
            raise NotImplementedError(f"mllama::{name} has no forward-mode derivative")


def differentiable_once(
    name: str, source: torch.Tensor, gradient: torch.Tensor | None
) -> torch.Tensor | None:
    """A gradient that was computed from `source`, such that differentiating it raises: what it was
    computed by may have no derivative, or another one.
    """
    if gradient is None or not torch.is_grad_enabled():
        return gradient
    return _Once.apply(gradient, source, name)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(gradient, source, name):
        return gradient.view_as(gradient)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.name = inputs[2]

    @staticmethod
    def backward(ctx, *grads):
        _no_derivative(ctx.name, _ONCE)(ctx, *grads)


def _no_derivative(name: str, why: str) -> Callable:
    def backward(ctx, *grads):
        raise NotImplementedError(f"mllama::{name} has no derivative: {why}")

    return backward
