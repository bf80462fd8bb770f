"""What may be computed again instead of being kept."""

import pytest
import torch

from mllama.nn.mlp import GatedMLP
from mllama.ops.recompute import apply_recomputing, recipe
from mllama.ops.swiglu import swiglu


def gated() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(2, 3, requires_grad=True), torch.randn(2, 3)


def test_the_consumer_alone_sees_how_its_input_was_made():
    gate, up = gated()
    seen = []

    def consumer(x):
        seen.append((x, recipe(x)))
        return 2 * x

    y = apply_recomputing(consumer, swiglu, gate, up)
    ((x, known),) = seen
    assert torch.equal(y, 2 * x) and torch.equal(known.function(*known.inputs), x)
    assert known.inputs[0] is gate and known.inputs[1] is up and recipe(x) is None


def test_nothing_is_known_of_a_tensor_that_was_changed():
    def consumer(x):
        assert recipe(x)
        x.mul_(2)
        assert recipe(x) is None and recipe(x.clone()) is None

    apply_recomputing(consumer, swiglu, *gated())


def test_nothing_is_left_behind_by_a_consumer_that_fails():
    seen = []

    def consumer(x):
        seen.append(x)
        raise KeyError

    with pytest.raises(KeyError):
        apply_recomputing(consumer, swiglu, *gated())
    assert recipe(seen[0]) is None


def test_without_gradients_there_is_nothing_to_know():
    gate, up = gated()
    with torch.no_grad():
        assert apply_recomputing(recipe, swiglu, gate, up) is None
    with torch.inference_mode():
        assert apply_recomputing(recipe, swiglu, gate.clone(), up.clone()) is None


def test_a_block_that_uses_it_compiles_in_one_graph():
    block, x = GatedMLP(6, 10), torch.randn(2, 6)

    def loss(x):
        return block(x).square().sum()

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)
