"""How well a model predicts the answers of rows."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mllama.data.collate import Collator
from mllama.data.rows import Example


@dataclass(frozen=True)
class Perplexity:
    """exp of the mean loss of the assistant's tokens.

    Attributes:
        total: over the tokens of all rows.
        rows: of each row alone.
        tokens: number of scored tokens in each row.
    """

    total: float
    rows: list[float]
    tokens: list[int]


@torch.no_grad()
def perplexity(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    max_length: int | None = None,
    progress: Callable[[int], None] = lambda rows: None,
) -> Perplexity:
    """The perplexity of the assistant's tokens, the end of each answer included, given all tokens
    before them. Rows are computed one by one, so that each has its own loss and no padding.

    Args:
        model: as `mllama.load` returns it, in eval mode.
        processor: its processor.
        examples: conversations.
        max_length: as `mllama.data.collate.Collator` takes it.
        progress: called with the number of rows after each pass.

    Raises:
        ValueError: there are no rows, or one cannot be encoded; names the row.
    """
    if not len(examples):
        raise ValueError("there are no rows to score")
    collator = Collator(model, processor, max_length)
    device = next(model.parameters()).device
    losses, counts = [], []
    for place in range(len(examples)):
        batch = {name: value.to(device) for name, value in collator([examples[place]]).items()}
        output = model(**batch, logits_to_keep=None, use_cache=False)
        losses.append(output.loss.double().item())
        counts.append(int(output.num_trained_tokens))
        progress(1)
    whole = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    return Perplexity(_exp(whole), [_exp(loss) for loss in losses], counts)


def _exp(loss: float) -> float:
    """exp, infinite where that is beyond the range of floats."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
