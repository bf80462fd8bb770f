"""What a LoRA training step keeps for its backward pass, and what it learns, beside stock
transformers with PEFT on the same weights.
"""

from functools import partial

import pytest
import torch
from torch.utils.checkpoint import checkpoint

import mllama
from benchmarks.harness import saved_bytes
from helpers import needs_kernels
from mllama.nn.mlp import MLP, GatedMLP

pytest.importorskip("peft")

from benchmarks.models import bench_train, training  # noqa: E402  imports peft

# The benchmark's proportions: every width and the vocabulary divided by 32.
TEXT = bench_train.TEXT | {
    "vocab_size": 4008,
    "hidden_size": 64,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 1,
}
VISION = bench_train.VISION | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "image_size": 32,
    "patch_size": 8,
}
TILED = bench_train.TILED | {
    "hidden_size": 32,
    "intermediate_size": 64,
    "attention_heads": 2,
    "num_hidden_layers": 6,
    "num_global_layers": 1,
    "vision_output_dim": 128,
    "image_size": 28,
}
SETUPS = {
    "Llama": lambda text, image: bench_train.llama(text=text, tokens=64),
    "SigLIP + Llama": lambda text, image: bench_train.siglip_llama(text, VISION, image),
    "Llama-3.2-Vision": lambda text, image: bench_train.llama_vision(
        text | {"hidden_size": 128}, TILED, image
    ),
}


def pair(setup, dtype, vocabulary=TEXT["vocab_size"]):
    torch.manual_seed(0)
    config, make, batch = SETUPS[setup](TEXT | {"vocab_size": vocabulary}, vocabulary - 1)
    return *training.pair(config, make, 2, dtype), batch


@needs_kernels
@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_most_half_of_what_peft_keeps(setup, dtype):
    ours, theirs, batch = pair(setup, dtype)
    mine = bench_train.memory(ours, training.our_loss, batch)
    other = bench_train.memory(theirs, training.their_loss, batch)
    assert mine[0] <= 0.5 * other[0] and mine[1] <= 0.5 * other[1]


@pytest.mark.parametrize("setup", SETUPS)
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.bfloat16, 1e-2)])
def test_the_same_losses_for_fifty_steps(setup, dtype, tolerance):
    """Of ours, of PEFT's and, as each is a mean over the same labels, of PEFT's in chunks."""
    curves = []
    for side, loss in (
        (0, training.our_loss),
        (1, training.their_loss),
        (1, training.chunked_loss),
    ):
        *models, batch = pair(setup, dtype, vocabulary=200)
        step = training.training_step(models[side], loss, batch, learning_rate=1e-4)
        curves.append(torch.stack([step().float() for _ in range(50)]))
    assert curves[0][0] - curves[0][-1] > 0.01  # it learns, if slowly: faster, rounding grows
    for other in curves[1:]:
        torch.testing.assert_close(curves[0], other, rtol=tolerance, atol=0)


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


@needs_kernels
@pytest.mark.parametrize("activation", ["gelu", "gelu_pytorch_tanh", "quick_gelu", "gelu_new"])
def test_the_activation_is_not_kept(activation):
    block, x = MLP(64, 256, activation), torch.randn(2, 5, 64, requires_grad=True)
    mllama.convert_linears_to_lora(block, rank=2)

    def kept():
        return saved_bytes(lambda: block(x).sum(), block.parameters())

    def gradients():
        return torch.autograd.grad(block(x).square().sum(), [x, *mllama.lora_parameters(block)])

    without, found = kept(), gradients()
    block.fc2.register_forward_pre_hook(lambda module, inputs: (inputs[0].clone(),))
    assert kept() - without == 2 * 5 * 256 * 4
    assert all(map(torch.equal, found, gradients()))
