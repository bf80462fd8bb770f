"""What swiglu and geglu share: checks, fakes and the autograd formula of a function of (gate, up)."""

import torch

from mllama.ops._dispatch import fresh, kind, register


def check_alike(op: str, gate: torch.Tensor, up: torch.Tensor) -> None:
    """Raise ValueError unless gate and up are of one shape and dtype."""
    if up.shape != gate.shape or up.dtype != gate.dtype:
        raise ValueError(f"{op}: up must be as gate, {kind(gate)}, got {kind(up)}")


def register_gated(name: str):
    """Register `mllama::name` and its backward operator; return the function to call it by."""

    backward = register(
        f"_{name}_backward", fake=lambda grad_y, gate, up: (fresh(gate), fresh(gate))
    )

    def fake(gate, up):
        check_alike(name, gate, up)
        return fresh(gate)

    def setup(ctx, inputs, output):
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*inputs)

    def derivative(ctx, grad_y):
        return (None, None) if grad_y is None else backward(grad_y, *ctx.saved_tensors)

    return register(name, fake=fake, backward=derivative, setup_context=setup)
