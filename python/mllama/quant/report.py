"""How far a packed model is from the model that it was packed from, on a text."""

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mllama.nn.packed import PackedLinear


def cross_entropy(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """Of each token after the first of its row, in nats.

    Args:
        model: returns `logits` for `input_ids`.
        ids: int64 [rows, T], at least 2 tokens a row.

    Returns:
        float32 [rows, T - 1].
    """
    return torch.cat([_loss(_log_probabilities(model, row), row) for row in ids.split(1)])


def perplexity(losses: torch.Tensor) -> float:
    """Of what `cross_entropy` returns."""
    return losses.double().mean().exp().item()


@torch.inference_mode()
def compare(source: nn.Module, packed: nn.Module, ids: torch.Tensor) -> dict[str, Any]:
    """Run both models on a text.

    Args:
        source: the model whose weights were packed.
        packed: the packed one.
        ids: int64 [rows, T], at least 2 tokens a row.

    Returns:
        "perplexity": of "source" and "packed", and the "change" in percent; "logits": "mean_error"
        and "max_error", absolute, "kl_divergence" of the packed model's distribution from the
        source's in nats, and "same_choice", the share of tokens with equal likeliest successors;
        "layers": for each linear layer that the text went through, by name, the norm of its
        output's error over the norm of its output, for the source's inputs.
    """
    losses: dict[str, list[torch.Tensor]] = {"source": [], "packed": []}
    total, most, divergence, same, count = 0.0, 0.0, 0.0, 0, 0
    errors = _LayerErrors(source, packed)
    for row in ids.split(1):
        with errors.measured():
            expected = source(input_ids=row).logits[0].float()
        logits = packed(input_ids=row).logits[0].float()
        difference = (logits - expected).abs()
        total += difference.sum().item()
        most = max(most, difference.max().item())
        same += int((logits.argmax(-1) == expected.argmax(-1)).sum())
        count += len(logits)
        wanted, found = expected.log_softmax(-1), logits.log_softmax(-1)
        divergence += (wanted.exp() * (wanted - found)).sum().item()
        losses["source"].append(_loss(wanted[None, :-1], row))
        losses["packed"].append(_loss(found[None, :-1], row))
    found_in = {name: perplexity(torch.cat(parts)) for name, parts in losses.items()}
    return {
        "perplexity": found_in | {"change": 100 * (found_in["packed"] / found_in["source"] - 1)},
        "logits": {
            "mean_error": total / count / expected.shape[-1],
            "max_error": most,
            "kl_divergence": divergence / count,
            "same_choice": same / count,
        },
        "layers": errors.relative(),
    }


def _log_probabilities(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    """[1, T - 1, vocabulary], of each token's successor."""
    with torch.inference_mode():
        return model(input_ids=ids).logits[:, :-1].float().log_softmax(-1)


def _loss(log_probabilities: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """[1, T - 1]."""
    return -log_probabilities.gather(-1, ids[:, 1:, None])[..., 0]


class _LayerErrors:
    """Squared norms of linear layers' outputs, and of what packing changes in them."""

    def __init__(self, source: nn.Module, packed: nn.Module):
        layers = dict(packed.named_modules())
        self._pairs = {
            name: (module, layers[name])
            for name, module in source.named_modules()
            if isinstance(module, nn.Linear) and isinstance(layers.get(name), PackedLinear)
        }
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    @contextmanager
    def measured(self) -> Iterator[None]:
        """Context in which calls of the source's layers are compared."""
        handles = [
            module.register_forward_hook(self._hook(name, twin))
            for name, (module, twin) in self._pairs.items()
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str, twin: nn.Module):
        def add(module, arguments, output) -> None:
            difference = twin(arguments[0]).float() - output.float()
            self._sums[name][0] += difference.square().sum().item()
            self._sums[name][1] += output.float().square().sum().item()

        return add

    def relative(self) -> dict[str, float]:
        return {
            name: (error / size) ** 0.5 if size else 0.0
            for name, (error, size) in self._sums.items()
        }
