"""SwiGLU (Shazeer, 2020): the gated activation between the linear layers of a feed-forward block."""

import torch

from mllama.ops._dispatch import check_float, use_kernel
from mllama.ops._gated import check_alike, register_gated


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return silu(gate) * up, with silu(x) = x / (1 + exp(-x)).

    Args:
        gate: any shape; float32, bfloat16 or float16.
        up: of gate's shape and dtype.

    Returns:
        A tensor of that shape and dtype. Computed in float32 and rounded once.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shapes or dtypes differ.
    """
    check_float("swiglu", gate=gate, up=up)
    if use_kernel(gate):
        return _swiglu(gate, up)
    check_alike("swiglu", gate, up)
    return reference(gate, up)


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`swiglu` in plain torch."""
    return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)


_swiglu = register_gated("swiglu")
