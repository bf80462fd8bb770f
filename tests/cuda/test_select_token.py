"""What select_token's CUDA kernel promises beyond the CPU's: sums of probabilities are float64."""

import math

import torch

from mllama.ops import select_token


def test_small_probabilities_beside_a_large_one():
    """A float32 sum that has the large one would lose the small ones of the same thread."""
    small, size = 2e-8, 40 * 256  # 40 of them in each thread's chunk
    logits = torch.full((3, size), math.log(small))
    logits[:, 0] = 0
    wanted = torch.tensor([10, 30, 39])
    total = 1 + (size - 1) * small
    uniform = (1 + (wanted.double() - 0.5) * small) / total
    assert torch.equal(select_token(logits, uniform), wanted)
