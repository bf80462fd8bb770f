"""What a LoRA training step keeps for its backward pass, beside stock transformers with PEFT on the
same weights.
"""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mllama
from benchmarks.harness import saved_bytes
from benchmarks.models.bench_llama import CONFIG
from helpers import needs_kernels
from mllama.nn.mlp import GatedMLP

pytest.importorskip("peft")

from benchmarks.models import bench_lora  # noqa: E402  imports peft

# The benchmark's proportions: Llama-3.2-1B's, every width and the vocabulary divided by 32.
SMALL = CONFIG | {
    "vocab_size": 4008,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
IDS = torch.arange(7, 7 + 64)[None]


@needs_kernels
def test_at_most_half_of_what_peft_keeps():
    ours, theirs = (
        bench_lora.saved(model, IDS) for model in bench_lora.pair(SMALL, 2, torch.bfloat16)
    )
    assert ours <= 0.5 * theirs


@needs_kernels
def test_the_gated_product_is_not_kept():
    block, x = GatedMLP(64, 256), torch.randn(2, 5, 64, requires_grad=True)
    layers = mllama.convert_linears_to_lora(block, rank=2)
    for layer in layers.values():
        torch.nn.init.normal_(layer.lora_b.weight)
    wide = 2 * 5 * 256 * x.element_size()  # gate and up are kept, and not their product
    assert 2 * wide < saved_bytes(lambda: block(x).sum(), block.parameters()) < 2.8 * wide

    def gradients(call):
        return torch.autograd.grad(call(x).square().sum(), [x, *mllama.lora_parameters(block)])

    recomputed = [
        gradients(call) for call in (block, partial(checkpoint, block, use_reentrant=False))
    ]
    block.down_proj.register_forward_pre_hook(
        lambda module, inputs: (inputs[0].clone(),)
    )  # nobody knows how a clone was made
    assert saved_bytes(lambda: block(x).sum(), block.parameters()) > 3 * wide
    assert all(
        torch.equal(*pair)
        for found in recomputed
        for pair in zip(found, gradients(block), strict=True)
    )


def test_the_models_compared_learn_the_same():
    losses, gradients = [], []
    for model in bench_lora.pair(SMALL, 2, torch.float32):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        gradients.append(
            torch.autograd.grad(
                losses[-1],
                [parameter for parameter in model.parameters() if parameter.requires_grad],
            )
        )
    torch.testing.assert_close(*losses)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(
            mine, theirs, rtol=1e-3, atol=1e-5 + 1e-3 * theirs.abs().max().item()
        )
