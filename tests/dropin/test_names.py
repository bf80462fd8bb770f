"""`older_names`: children under older names, computed with by the package's own code."""

import inspect

import torch
from torch import nn

from mllama.dropin._names import older_names
from mllama.nn.mlp import GatedMLP


@older_names(gate_proj="fc1", up_proj="fc2", down_proj="fc3")
class Older(GatedMLP):
    def __init__(self, size: int, inner: int = 24):
        super().__init__(size, inner)


def test_children_have_the_older_names_alone():
    module = Older(8)
    assert list(module.state_dict()) == ["fc1.weight", "fc2.weight", "fc3.weight"]
    assert [name for name, _ in module.named_children()] == ["fc1", "fc2", "fc3"]
    assert module.gate_proj is module.fc1 and module.down_proj is module.fc3


def test_the_packages_forward_pass_runs_on_them():
    module, own, x = Older(8), GatedMLP(8, 24), torch.randn(3, 8)
    own.load_state_dict(
        {
            ours: module.state_dict()[f"fc{place}.weight"]
            for place, ours in enumerate(own.state_dict(), 1)
        }
    )
    torch.testing.assert_close(module(x), own(x), rtol=0, atol=0)


def test_what_takes_a_childs_place_is_what_computes():
    module = Older(8)
    module.fc3 = nn.Linear(24, 5)
    assert module(torch.randn(3, 8)).shape == (3, 5)


def test_the_signature_is_the_subclass_own():
    assert list(inspect.signature(Older).parameters) == ["size", "inner"]


def test_children_keep_their_order():
    @older_names(gate_proj="fc1")
    class First(GatedMLP):
        pass

    assert list(First(8, 24)._modules) == ["fc1", "up_proj", "down_proj"]
