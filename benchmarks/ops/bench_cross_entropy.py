"""linear_cross_entropy on Llama 3's vocabulary: a frozen head, and one that is trained."""

from collections.abc import Iterator

import torch
from torch.nn.functional import cross_entropy, linear

from benchmarks import shapes
from benchmarks.harness import Case, both_directions
from mllama.ops import linear_cross_entropy

PEER = "torch: linear, and cross_entropy of float32 logits"


def cases() -> Iterator[Case]:
    """Numbers of tokens, dtypes, and whether weight has a gradient."""
    vocabulary, width = shapes.VOCABULARY, shapes.HIDDEN
    for dtype in (torch.float32, torch.bfloat16):
        weight = (torch.randn(vocabulary, width) / width**0.5).to(dtype)
        for tokens, frozen in ((256, True), (2048, True), (256, False)):
            hidden = torch.randn(tokens, width, dtype=dtype)
            labels = torch.randint(0, vocabulary, (tokens,))
            name = f"{'frozen' if frozen else 'trained'} {tokens}x{vocabulary}x{width}"
            yield from both_directions(
                name,
                lambda hidden, weight, labels=labels: linear_cross_entropy(hidden, weight, labels),
                lambda hidden, weight, labels=labels: cross_entropy(
                    linear(hidden, weight).float(), labels
                ),
                (hidden, weight),
                differentiable=1 if frozen else 2,
                forward_flops=2 * tokens * weight.numel(),
                backward_flops=(2 if frozen else 4) * tokens * weight.numel(),
            )
