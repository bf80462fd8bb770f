"""`Tools`: the fused norm and feed-forward block against this package's own."""

import pytest
import torch
from torch import nn

from mllama.dropin.Tools import (
    FusedFeedForward,
    FusedRMSNorm,
    FusedSwiGLU,
    convert_feedforward_to_fused,
)
from mllama.nn.mlp import GatedMLP
from mllama.nn.norm import RMSNorm

NAMES = {
    "fc": ("fc1", "fc2", "fc3"),
    "w": ("w1", "w3", "w2"),
    "proj": ("gate_proj", "up_proj", "down_proj"),
}


def block(names: str, bias: bool, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A feed-forward block of 8 and 12, its layers under these names."""
    module = nn.Module()
    for name, (width, inner) in zip(NAMES[names], ((8, 12), (8, 12), (12, 8)), strict=True):
        setattr(module, name, nn.Linear(width, inner, bias=bias, dtype=dtype))
    return module


@pytest.mark.parametrize("bias", [False, True])
def test_parameters_and_shapes(bias):
    swiglu = FusedSwiGLU(8, 12, bias=bias)
    shapes = {"w_gate": (12, 8), "w_up": (12, 8)} | (
        {"b_gate": (12,), "b_up": (12,)} if bias else {}
    )
    assert {name: tuple(value.shape) for name, value in swiglu.named_parameters()} == shapes
    assert bias or (swiglu.b_gate is None and swiglu.b_up is None)
    assert swiglu(torch.randn(2, 3, 8)).shape == (2, 3, 12)
    whole = FusedFeedForward(8, 12, bias=bias)
    assert (
        whole(torch.randn(2, 3, 8)).shape == (2, 3, 8) and (whole.w_down.bias is not None) is bias
    )
    assert whole.state_dict().keys() >= {"swiglu.w_gate", "swiglu.w_up", "w_down.weight"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("names", NAMES)
def test_a_converted_block_computes_what_the_package_does(names, bias, dtype):
    theirs, ours = block(names, bias, dtype), GatedMLP(8, 12, bias=bias).to(dtype)
    for mine, name in zip(NAMES["proj"], NAMES[names], strict=True):
        getattr(ours, mine).load_state_dict(getattr(theirs, name).state_dict())
    fused, x = convert_feedforward_to_fused(theirs), torch.randn(2, 3, 8, dtype=dtype)
    assert fused.w_down.weight.dtype == dtype
    torch.testing.assert_close(fused(x), ours(x), rtol=0, atol=0)
    with torch.no_grad():
        getattr(theirs, NAMES[names][0]).weight.zero_()  # the copies are its own
    torch.testing.assert_close(fused(x), ours(x), rtol=0, atol=0)


def test_gradients_reach_every_parameter():
    fused = FusedFeedForward(8, 12, bias=True)
    fused(torch.randn(3, 8)).sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in fused.parameters())


def test_a_module_without_such_layers_is_refused():
    with pytest.raises(
        TypeError, match="must have linear layers w1, w3, w2; fc1, fc2, fc3; .*got Linear"
    ):
        convert_feedforward_to_fused(nn.Linear(2, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_norm_adds_a_residual(dtype):
    norm, own = FusedRMSNorm(8, eps=1e-5).to(dtype), RMSNorm(8, eps=1e-5).to(dtype)
    x, residual = torch.randn(2, 3, 8).to(dtype), torch.randn(2, 3, 8).to(dtype)
    assert (
        norm.eps == 1e-5 and list(norm.state_dict()) == ["weight"] and FusedRMSNorm(8).eps == 1e-6
    )
    torch.testing.assert_close(norm(x), own(x), rtol=0, atol=0)
    torch.testing.assert_close(norm(x, residual), own(x + residual))
    torch.testing.assert_close(norm(x, residual=residual), own.add(x, residual)[0], rtol=0, atol=0)
