"""What swiglu and geglu share: checks, fakes and the autograd formula of a function of (gate, up)."""

import torch

from mllama.ops._dispatch import check_float, register


def check(op: str, gate: torch.Tensor, up: torch.Tensor) -> None:
    """Raise TypeError or ValueError unless gate and up are float tensors of one shape and dtype."""
    check_float(op, gate=gate, up=up)
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"{op}: up must be as gate, {tuple(gate.shape)} of {gate.dtype}, got {tuple(up.shape)} of {up.dtype}")


def register_gated(name: str):
    """Register `mllama::name` and its backward operator; return the function to call it by."""

    def fresh(like):
        return torch.empty_like(like, memory_format=torch.contiguous_format)

    backward = register(f"_{name}_backward", fake=lambda grad_y, gate, up: (fresh(gate), fresh(gate)))

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    def derivative(ctx, grad_y):
        return (None, None) if grad_y is None else backward(grad_y, *ctx.saved_tensors)

    return register(name, fake=lambda gate, up: fresh(gate), backward=derivative, setup_context=setup)
