"""The loss of a language model's head: a linear layer and cross entropy, without all logits at
once.
"""

import functools
import math
from collections.abc import Iterator

import torch
from torch.nn.functional import linear

from mllama.ops._dispatch import (
    autocast_dtype,
    check_device,
    check_tensor,
    check_tensors,
    differentiable_once,
    dtype_name,
    exact,
)
from mllama.ops.cross_entropy import cross_entropy_

REDUCTIONS = ("mean", "sum", "none")
# Bytes of the logits that exist at once.
_CHUNK = 1 << 25


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items_in_batch: int | float | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy of the logits hidden W' against labels, in float32. The logits of a few rows
    exist at a time, those of rows that are not labeled never.

    Args:
        hidden: [..., in], float32, bfloat16 or float16. Under torch.autocast it is cast to
            autocast's dtype first, as in nn.Linear.
        weight: [vocabulary, in], of the same dtypes; cast to hidden's dtype for the product.
        labels: int64 [...], one per row of hidden: of the vocabulary, or ignore_index.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2; None leaves them.
        reduction: "mean" over the labeled rows, "sum", or "none".
        ignore_index: label of rows that are left out.
        num_items_in_batch: divisor of the sum in place of the number of labeled rows; for "mean".
    Returns:
        float32 [], or float32 [...] with 0 where a row is left out. The mean of no labeled rows is
        NaN, as PyTorch's is.

        Gradients are exact. That of hidden is computed with the loss where weight is frozen, and is
        what is saved for the backward pass; else hidden is saved, and the logits are computed
        again, with weight's gradient summed in float32. Can be differentiated once.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes do not fit, a label is neither of the vocabulary nor ignore_index,
            softcap is not positive and finite, reduction is unknown, or num_items_in_batch is given
            for another reduction than "mean", or not above 0.
    """
    _check(hidden, weight, labels, softcap, reduction, ignore_index, num_items_in_batch)
    dtype = autocast_dtype(hidden)
    if dtype is not None:
        with exact(hidden):
            return linear_cross_entropy(
                hidden.to(dtype),
                weight.to(dtype),
                labels,
                softcap,
                reduction,
                ignore_index,
                num_items_in_batch,
            )
    rows, targets = hidden.reshape(-1, hidden.shape[-1]), labels.flatten()
    kept = None
    if not torch.compiler.is_compiling():  # where the number of labeled rows is unknown
        kept = (targets != ignore_index).nonzero().squeeze(1)
        rows, targets = rows[kept], targets[kept]
    # The kernel skips rows whose target is outside of the vocabulary.
    targets = targets.masked_fill(targets == ignore_index, -1)
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad
    losses = _Losses.apply(rows, weight, targets, softcap or 0.0, frozen)
    if reduction == "none":
        if kept is not None:
            losses = losses.new_zeros(labels.numel()).index_copy(0, kept, losses)
        return losses.view(labels.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / _count(labels, ignore_index, num_items_in_batch)


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items_in_batch: int | float | torch.Tensor | None = None,
) -> torch.Tensor:
    """`linear_cross_entropy` in plain torch, with all logits."""
    logits = linear(hidden, weight.to(hidden.dtype)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none"
    )
    if reduction == "none":
        return losses.view(labels.shape)
    total = losses.sum()
    return total if reduction == "sum" else total / _count(labels, ignore_index, num_items_in_batch)


def _count(
    labels: torch.Tensor, ignore_index: int, given: int | float | torch.Tensor | None
) -> torch.Tensor | int | float:
    if given is None:
        return (labels != ignore_index).sum()
    return given.to(labels.device) if isinstance(given, torch.Tensor) else given


def _check(hidden, weight, labels, softcap, reduction, ignore_index, num_items_in_batch) -> None:
    op = "linear_cross_entropy"
    check_tensors(op, hidden=hidden, weight=weight)
    check_tensor(op, "labels", labels)
    check_device(op, "labels", labels, "hidden", hidden)
    if labels.dtype != torch.int64:
        raise TypeError(f"{op}: labels must be int64, got {dtype_name(labels)}")
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if hidden.dim() == 0:
        raise ValueError(f"{op}: hidden must have at least one dimension")
    width = hidden.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width or not len(weight):
        raise ValueError(
            f"{op}: weight must be [vocabulary, {width}] for hidden {list(hidden.shape)}, "
            f"got {list(weight.shape)}"
        )
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: labels must be {list(hidden.shape[:-1])} for hidden {list(hidden.shape)}, "
            f"got {list(labels.shape)}"
        )
    _check_options(op, softcap, reduction, num_items_in_batch)
    if not torch.compiler.is_compiling() and labels.device.type != "meta":
        known = (labels == ignore_index) | ((labels >= 0) & (labels < len(weight)))
        if not bool(known.all()):
            raise ValueError(
                f"{op}: labels must be {ignore_index} or within the vocabulary (0 to "
                f"{len(weight) - 1}), got {labels.min()} to {labels.max()}"
            )


def _check_options(op: str, softcap, reduction, num_items_in_batch) -> None:
    if softcap is not None:
        if isinstance(softcap, bool) or not isinstance(softcap, (int, float)):
            raise TypeError(f"{op}: softcap must be a number or None, got {type(softcap).__name__}")
        if not 0 < softcap < math.inf:
            raise ValueError(f"{op}: softcap must be positive and finite, got {softcap}")
    if reduction not in REDUCTIONS:
        raise ValueError(
            f"{op}: reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}"
        )
    count = num_items_in_batch
    if count is None:
        return
    if reduction != "mean":
        raise ValueError(f"{op}: num_items_in_batch is for the mean, got reduction {reduction!r}")
    if isinstance(count, bool) or not isinstance(count, (int, float, torch.Tensor)):
        raise TypeError(
            f"{op}: num_items_in_batch must be a number or a tensor of one, "
            f"got {type(count).__name__}"
        )
    if isinstance(count, torch.Tensor) and count.numel() != 1:
        raise ValueError(f"{op}: num_items_in_batch must be one number, got {list(count.shape)}")
    if not torch.compiler.is_compiling() and not count > 0:
        raise ValueError(f"{op}: num_items_in_batch must be above 0, got {count}")


class _Losses(torch.autograd.Function):
    """Losses of rows, with the gradient of hidden at once where weight is frozen."""

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        softcap: float,
        frozen: bool,
    ) -> torch.Tensor:
        """hidden [N, in], weight [vocabulary, in], targets int64 [N] -> float32 [N]."""
        losses = hidden.new_empty(len(hidden), dtype=torch.float32)
        gradient = torch.empty_like(hidden) if frozen else None
        factor = _factor(hidden) if frozen else 0.0
        typed = weight.to(hidden.dtype)
        for rows, scores, target in _chunks(hidden, typed, targets):
            losses[rows] = cross_entropy_(scores, target, softcap, factor)
            if gradient is not None:
                gradient[rows] = scores @ typed
        ctx.softcap = softcap
        ctx.save_for_backward(*([hidden, weight, targets] if gradient is None else [gradient]))
        return losses

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        if len(saved) == 1:
            by_hidden, by_weight = (saved[0] * (grad / _factor(saved[0]))[:, None]), None
            by_hidden = by_hidden.to(saved[0].dtype)
        else:
            by_hidden, by_weight = _recomputed(*saved, ctx.softcap, grad, ctx.needs_input_grad[0])
        once = functools.partial(differentiable_once, "linear_cross_entropy", grad)
        return once(by_hidden), once(by_weight), None, None, None


def _recomputed(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    grad: torch.Tensor,
    wants_hidden: bool,
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """Gradients of hidden and weight, from the logits once more."""
    by_hidden = torch.empty_like(hidden) if wants_hidden else None
    by_weight = torch.zeros_like(weight, dtype=torch.float32)
    factor, typed = _factor(hidden), weight.to(hidden.dtype)
    for rows, scores, target in _chunks(hidden, typed, targets):
        cross_entropy_(scores, target, softcap, factor)
        scores *= (grad[rows] / factor)[:, None]
        if by_hidden is not None:
            by_hidden[rows] = scores @ typed
        by_weight += scores.T @ hidden[rows]
    return by_hidden, by_weight.to(weight.dtype)


def _factor(hidden: torch.Tensor) -> float:
    """What gradients of scores are stored times: float16 would lose small probabilities."""
    return 1024.0 if hidden.dtype == torch.float16 else 1.0


def _chunks(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some rows, their logits and their targets; all of one dtype."""
    size = max(1, _CHUNK // (len(weight) * hidden.element_size()))
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        yield rows, linear(hidden[rows], weight), targets[rows]
