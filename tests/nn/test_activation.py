"""Activations against transformers' of the same name."""

import pytest
import torch
from transformers.activations import ACT2FN

from mllama.nn.activation import ACTIVATIONS


def test_every_name_without_learned_parameters_is_there():
    assert set(ACT2FN) - set(ACTIVATIONS) == {"prelu", "xielu"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_equal_transformers(name, dtype):
    x = torch.linspace(-12, 12, 1001, dtype=dtype)
    results = []
    for function in (ACTIVATIONS[name], ACT2FN[name]):
        leaf = x.clone().requires_grad_()
        y = function(leaf)
        results.append((y.detach(), *torch.autograd.grad(y.sum(), leaf)))
    torch.testing.assert_close(*results, rtol=0, atol=0)
