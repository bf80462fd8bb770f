"""SwiGLU and GEGLU (Shazeer, 2020): gated activations of feed-forward blocks."""

import functools

import torch
from torch.nn.functional import gelu, silu

from mllama.ops._dispatch import check_tensors, fresh, kind, register, use_kernel
from mllama.ops.recompute import recomputable


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(gate) * up, with silu(x) = x / (1 + exp(-x)).

    Args:
        gate: any shape; float32, bfloat16 or float16.
        up: as gate.

    Returns:
        A tensor of gate's shape and dtype. Computed in float32 and rounded once.

    Raises:
        TypeError: an argument is not a tensor, or has another dtype.
        ValueError: shapes, dtypes or devices differ.
    """
    if use_kernel("gated", gate):
        return recomputable(_swiglu(gate, up), swiglu, gate, up)
    _check("swiglu", gate, up)
    return swiglu_reference(gate, up)


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """gelu(gate) * up, with GELU's tanh approximation: gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x +
    0.044715 x^3))).

    Arguments, Returns and Raises as `swiglu`.
    """
    if use_kernel("gated", gate):
        return recomputable(_geglu(gate, up), geglu, gate, up)
    _check("geglu", gate, up)
    return geglu_reference(gate, up)


def swiglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`swiglu` in plain torch."""
    return (silu(gate.float()) * up.float()).to(gate.dtype)


def geglu_reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`geglu` in plain torch."""
    return (gelu(gate.float(), approximate="tanh") * up.float()).to(gate.dtype)


def _check(op: str, gate: torch.Tensor, up: torch.Tensor) -> None:
    check_tensors(op, gate=gate, up=up)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"{op}: up must be as gate, {kind(gate)}, got {kind(up)}")


def _register(name: str):
    """Register `mllama::name` and its backward operator; return the function that calls it."""
    backward = register(
        f"_{name}_backward", fake=lambda grad_y, gate, up: (fresh(gate), fresh(gate))
    )

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    def derivative(ctx, grad_y):
        return (None, None) if grad_y is None else backward(grad_y, *ctx.saved_tensors)

    return register(
        name,
        check=functools.partial(_check, name),
        fake=lambda gate, up: fresh(gate),
        backward=derivative,
        setup_context=setup,
    )


_swiglu = _register("swiglu")
_geglu = _register("geglu")
