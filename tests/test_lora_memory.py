"""What a LoRA training step keeps for its backward pass, beside stock transformers with PEFT on the same weights."""

import pytest
import torch

from benchmarks.models.bench_llama import CONFIG

pytest.importorskip("peft")

from benchmarks.models import bench_lora  # noqa: E402  imports peft

# The benchmark's proportions: Llama-3.2-1B's, every width and the vocabulary divided by 32.
SMALL = CONFIG | {"vocab_size": 4008, "hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1}
IDS = torch.arange(7, 7 + 64)[None]


def test_at_most_six_tenths_of_peft():
    ours, theirs = (bench_lora.saved(model, IDS) for model in bench_lora.pair(SMALL, 2, torch.bfloat16))
    assert ours <= 0.6 * theirs


def test_the_models_compared_learn_the_same():
    losses, gradients = [], []
    for model in bench_lora.pair(SMALL, 2, torch.float32):
        losses.append(model(input_ids=IDS, labels=IDS).loss)
        gradients.append(torch.autograd.grad(losses[-1], [parameter for parameter in model.parameters() if parameter.requires_grad]))
    torch.testing.assert_close(*losses)
    for mine, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5 + 1e-3 * theirs.abs().max().item())
