"""GEGLU (Shazeer, 2020): the gated activation between the linear layers of a feed-forward block."""

import torch

from mllama.ops._dispatch import check_float, use_kernel
from mllama.ops._gated import check_alike, register_gated


def geglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return gelu(gate) * up, with GELU's tanh form: gelu(x) = x / 2 (1 + tanh(sqrt(2 / pi) (x +
    0.044715 x^3))).

    Args:
        gate: any shape; float32, bfloat16 or float16.
        up: of gate's shape and dtype.

    Returns:
        A tensor of that shape and dtype. Computed in float32 and rounded once.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: shapes or dtypes differ.
    """
    check_float("geglu", gate=gate, up=up)
    if use_kernel(gate):
        return _geglu(gate, up)
    check_alike("geglu", gate, up)
    return reference(gate, up)


def reference(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """`geglu` in plain torch."""
    return (torch.nn.functional.gelu(gate.float(), approximate="tanh") * up.float()).to(gate.dtype)


_geglu = register_gated("geglu")
