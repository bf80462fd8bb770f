"""Feed-forward blocks against their formulas."""

import pytest
import torch
from torch.nn import functional as F

from mllama.nn.activation import softcap
from mllama.nn.mlp import MLP, GatedMLP

GATES = {
    "silu": F.silu,
    "swish": F.silu,
    "gelu_pytorch_tanh": lambda x: F.gelu(x, approximate="tanh"),
}


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_a_gated_block(name, bias):
    mlp, x = GatedMLP(16, 24, name, bias), torch.randn(2, 3, 16)
    expected = mlp.down_proj(GATES[name](mlp.gate_proj(x)) * mlp.up_proj(x))
    torch.testing.assert_close(mlp(x), expected)
    assert (mlp.up_proj.bias is not None) == bias


def test_a_gate_that_is_not_computed_is_refused():
    with pytest.raises(ValueError, match="relu"):
        GatedMLP(16, 24, "relu")


def test_a_plain_block():
    mlp, x = MLP(16, 24, "quick_gelu"), torch.randn(2, 3, 16)
    inner = mlp.fc1(x)
    torch.testing.assert_close(mlp(x), mlp.fc2(inner * (1.702 * inner).sigmoid()))


def test_a_softcap_bounds_and_keeps_what_is_small():
    x = torch.tensor([0.0, 1e-3, 5.0, -300.0])
    assert softcap(x, None) is x
    torch.testing.assert_close(softcap(x, 2.0), 2 * torch.tanh(x / 2))
    assert softcap(x, 2.0).abs().max() <= 2
