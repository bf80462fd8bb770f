"""What is recomputed in the backward pass instead of being saved."""

import pytest
import torch

import mllama
from benchmarks.harness import saved_bytes
from helpers import needs_kernels
from mllama.nn.mlp import GatedMLP
from mllama.nn.plain import takes_recompute
from mllama.ops import lora_linear, swiglu
from mllama.ops.recompute import Recompute

W, A, B = torch.randn(6, 64), torch.randn(2, 64), torch.randn(6, 2)


def gated():
    return torch.randn(3, 64, requires_grad=True), torch.randn(3, 64, requires_grad=True)


def gradients(gate, up, recompute=None):
    x = swiglu(gate, up)
    if recompute is not None:
        recompute = Recompute(recompute(x), swiglu, (gate, up))
    return torch.autograd.grad(
        lora_linear(x, W, A, B, recompute=recompute).square().sum(), (gate, up)
    )


@needs_kernels
def test_the_result_is_recomputed_and_not_saved():
    gate, up = gated()
    calls = []

    def product(gate, up):
        calls.append(gate)
        return swiglu(gate, up)

    x = swiglu(gate, up)
    keeping = saved_bytes(lambda: lora_linear(x, W, A, B), [W, A, B])
    recompute = Recompute(x, product, (gate, up))
    y = lora_linear(x, W, A, B, recompute=recompute)
    assert (
        saved_bytes(lambda: lora_linear(x, W, A, B, recompute=recompute), [W, A, B, gate, up])
        == keeping - x.nbytes
    )
    assert not calls
    again = torch.autograd.grad(y.square().sum(), (gate, up))
    assert len(calls) == 1
    assert all(map(torch.equal, again, gradients(gate, up)))


@pytest.mark.parametrize("result", [lambda x: x, lambda x: x.clone()], ids=["x", "another"])
def test_gradients_are_the_same(result):
    """Also where `recompute` speaks of another tensor, and is of no effect."""
    gate, up = gated()
    assert all(map(torch.equal, gradients(gate, up, result), gradients(gate, up)))


def test_hooks_keep_a_layer_from_it():
    block = GatedMLP(6, 10)
    assert not takes_recompute(block.down_proj)
    mllama.convert_linears_to_lora(block, rank=2)
    assert takes_recompute(block.down_proj)
    handle = block.down_proj.register_forward_pre_hook(lambda module, inputs: None)
    assert not takes_recompute(block.down_proj)
    handle.remove()
    assert takes_recompute(block.down_proj)


def test_a_block_that_uses_it_compiles_in_one_graph():
    block, x = GatedMLP(6, 10), torch.randn(2, 6)
    mllama.convert_linears_to_lora(block, rank=2)

    def loss(x):
        return block(x).square().sum()

    expected = torch.autograd.grad(loss(x.requires_grad_()), x)[0]
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)
