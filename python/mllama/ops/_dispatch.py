"""What every operator file shares: the choice between kernel and reference, and checks of what a
caller passed.
"""

import contextlib
import functools
import inspect

import torch
from torch.autograd import forward_ad

from mllama import _ext

_EXTENSION = _ext.load()
FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def use_kernel(x: torch.Tensor) -> bool:
    """True when the compiled kernel serves this tensor: it lives on the CPU and operators are not
    disabled.

    A public function checks types, which would reach the user as torch's schema errors; shapes and
    values are checked by the kernel, and where it does not run by the function beside the
    reference: twice would cost short calls a quarter of their time.
    """
    return _EXTENSION is not None and x.is_cpu


def autocast_dtype(x: torch.Tensor) -> torch.dtype | None:
    """The dtype that autocast computes in on x's device, None where it is off. The meta device has
    none, and asking raises; that there is one, torch 2.11 could not be asked in a compiled graph.
    """
    kind = x.device.type
    return (
        torch.get_autocast_dtype(kind)
        if kind != "meta" and torch.is_autocast_enabled(kind)
        else None
    )


def exact(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """A context for a reference's matrix products: autocast, which would round them to 16 bits,
    leaves x's device alone.
    """
    return (
        contextlib.nullcontext()
        if autocast_dtype(x) is None
        else torch.autocast(x.device.type, enabled=False)
    )


def check_float(op: str, *, optional: tuple[str, ...] = (), **tensors: torch.Tensor | None) -> None:
    """Raise TypeError unless every tensor given is a float32, bfloat16 or float16 torch.Tensor;
    those named optional may be None.
    """
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            if tensor.dtype not in FLOAT_DTYPES:
                raise TypeError(
                    f"{op}: {name} must be float32, bfloat16 or float16, got {str(tensor.dtype).removeprefix('torch.')}"
                )
        elif tensor is not None or name not in optional:
            raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(tensor).__name__}")


def check_value(condition: bool, message: str) -> None:
    """Raise ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_eps(op: str, eps: float) -> None:
    """Raise TypeError unless eps is a number, ValueError unless it is finite and not negative."""
    if isinstance(eps, bool) or not isinstance(eps, (int, float)):
        raise TypeError(f"{op}: eps must be a number, got {type(eps).__name__}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"{op}: eps must be finite and not negative, got {eps}")


def kind(x: torch.Tensor) -> str:
    """Sizes and dtype for a message: [2, 3] of float32."""
    return f"{list(x.shape)} of {str(x.dtype).removeprefix('torch.')}"


def fresh(like: torch.Tensor) -> torch.Tensor:
    """For fakes: a contiguous tensor of like's shape and dtype, as kernels return them."""
    return torch.empty_like(like, memory_format=torch.contiguous_format)


def register(name: str, *, fake, backward=None, setup_context=None):
    """Give the compiled operator `mllama::name` its fake and its autograd formula; return the
    function to call it by.

    Without `backward` the operator is itself a derivative: differentiating it raises, since a
    missing formula would give silently wrong second derivatives. None where operators are disabled.
    """
    if _EXTENSION is None:
        return None
    if not hasattr(torch.ops.mllama, name):
        raise _ext.unavailable(
            f"mllama._C was built from other sources than these: it lacks the operator {name}"
        )
    qualified = f"mllama::{name}"
    torch.library.register_fake(qualified, _on_one_device(name, fake))
    if backward is None:
        backward, setup_context = _no_second_derivative(name), None
    torch.library.register_autograd(qualified, backward, setup_context=setup_context)
    return _caller(getattr(torch.ops.mllama, name).default, backward, setup_context)


def _on_one_device(name: str, fake):
    """The fake with a check before it: beside a meta tensor even real ones come here, and would get
    a result that nobody computed.
    """
    names = tuple(inspect.signature(fake).parameters)

    @functools.wraps(fake)
    def checked(*arguments):
        tensors = [
            (place, value)
            for place, value in zip(names, arguments, strict=False)
            if isinstance(value, torch.Tensor)
        ]
        first, home = tensors[0][0], tensors[0][1].device
        for place, tensor in tensors:
            if tensor.device != home:
                raise ValueError(
                    f"{name}: {place} is on {tensor.device}, {first} on {home}; all must be on one device"
                )
        return fake(*arguments)

    return checked


def _caller(overload, derivative, setup_context):
    """The overload for eager calls, with the same autograd formula around it in a cheaper way.

    torch.library's autograd layer costs 5 us a call where no gradient is wanted and 20 us where one
    is, more than the kernels take for one token. Here it is skipped or replaced by an
    autograd.Function (9 us). Compilers and torch.func get the overload.
    """

    class Node(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *arguments):
            with (
                torch._C._AutoDispatchBelowAutograd()
            ):  # what torch.library itself does at this place
                results = overload(*arguments)
            if setup_context is not None:
                setup_context(ctx, arguments, results)
            return results

        backward = staticmethod(derivative)

    apply = super(
        torch.autograd.Function, Node
    ).apply  # what Function.apply adds for torch.func costs a third more
    ours = f"{overload.name().removeprefix('mllama::').removesuffix('.default')}: "

    def call(*arguments):
        if torch.compiler.is_compiling():
            return overload(*arguments)
        if forward_ad._current_level >= 0:
            _refuse_tangents(overload, arguments)
        try:
            if torch._C._are_functorch_transforms_active():
                return overload(*arguments)
            if torch.is_grad_enabled():
                for argument in arguments:
                    if isinstance(argument, torch.Tensor) and argument.requires_grad:
                        return apply(*arguments)
            elif torch.is_inference_mode_enabled():  # nothing to skip
                return overload(*arguments)
            with torch._C._AutoDispatchBelowAutograd():
                return overload(*arguments)
        # what C++ threw as std::invalid_argument comes as a ValueError up to torch 2.14 only
        except RuntimeError as error:
            if type(error) is RuntimeError and str(error).startswith(ours):
                raise ValueError(str(error)) from None
            raise

    return call


def _refuse_tangents(overload, arguments) -> None:
    """Forward-mode derivatives have no formula, and torch would take them for zero without a word."""
    if any(
        isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None
        for value in arguments
    ):
        raise NotImplementedError(f"{overload.name()} has no forward-mode derivative")


def _no_second_derivative(name: str):
    def backward(ctx, *grads):
        raise NotImplementedError(
            f"mllama::{name} has no derivative: mllama's operators can be differentiated once"
        )

    return backward
