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
    check_dtype,
    check_number,
    check_tensors,
    differentiable_once,
    dtype_name,
    exact,
)
from mllama.ops.cross_entropy import cross_entropy_
from mllama.ops.head import Head
from mllama.ops.packed_layout import unpack

FLOAT32 = torch.finfo(torch.float32)
REDUCTIONS = ("mean", "sum", "none")
# Bytes of the logits that exist at once.
_CHUNK = 44 << 20


def linear_cross_entropy(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items_in_batch: int | float | torch.Tensor | None = None,
    *,
    out_features: int | None = None,
    packing: str | None = None,
) -> torch.Tensor:
    """Cross entropy of the logits hidden W' against labels, in float32. The logits of a few rows
    exist at a time, those of rows that are not labeled never.

    Args:
        hidden: [..., in], float32, bfloat16 or float16. Under torch.autocast it is cast to
            autocast's dtype first, as in nn.Linear.
        weight: [vocabulary, in], of the same dtypes; cast to hidden's dtype for the product. With
            `packing`, uint8 as `pack_weight` returns it, dequantized a tile at a time.
        labels: int64 [...], one per row of hidden: of the vocabulary, or ignore_index.
        softcap: logits become softcap * tanh(logits / softcap), as in Gemma 2; None leaves them.
        reduction: "mean" over the labeled rows, "sum", or "none".
        ignore_index: label of rows that are left out.
        num_items_in_batch: divisor of the sum in place of the number of labeled rows; for "mean".
        out_features, packing: of a packed weight, its rows and format. Default: weight is dense.

    Returns:
        float32 [], or float32 [...] with 0 where a row is left out. The mean of no labeled rows is
        NaN, as PyTorch's is. In a compiled graph, which cannot raise for labels, the loss of one
        that is refused below is NaN.

        Gradients are exact. That of hidden is computed with the loss where weight is frozen, and is
        what is saved for the backward pass; else hidden is saved, and the logits are computed
        again, with weight's gradient summed in float32. Can be differentiated once.

    Raises:
        TypeError: an argument has another type or dtype.
        ValueError: shapes do not fit, a label is neither of the vocabulary nor ignore_index,
            ignore_index is no int64, packing is not known, out_features is given for a dense weight
            or not for a packed one, softcap is not positive and finite in float32, reduction is
            unknown, or num_items_in_batch is given for another reduction than "mean", or not
            positive and finite.
    """
    head = Head(weight, out_features, packing)
    _check(hidden, head, labels, softcap, reduction, ignore_index, num_items_in_batch)
    dtype = autocast_dtype(hidden)
    if dtype is not None:
        with exact(hidden):
            return linear_cross_entropy(
                hidden.to(dtype),
                weight.to(dtype) if packing is None else weight,
                labels,
                softcap,
                reduction,
                ignore_index,
                num_items_in_batch,
                out_features=out_features,
                packing=packing,
            )
    rows, targets = hidden.reshape(labels.numel(), hidden.shape[-1]), labels.flatten()
    kept = None
    if _reads_labels(labels) and bool((targets == ignore_index).any()):
        kept = (targets != ignore_index).nonzero().squeeze(1)
        rows, targets = rows[kept], targets[kept]
    # The kernel skips rows whose target is outside of the vocabulary.
    targets = targets.masked_fill(targets == ignore_index, -1)
    frozen = torch.is_grad_enabled() and hidden.requires_grad and not weight.requires_grad
    # By nothing else the gradient that is saved would be connected with hidden.
    anchor = rows[:0].clone() if frozen else None
    losses = _Losses.apply(rows, *head, targets, softcap or 0.0, anchor)
    if not _reads_labels(labels):
        known = _known(labels.flatten(), ignore_index, head.vocabulary)
        losses = losses.masked_fill(~known, math.nan)
    if kept is not None and reduction == "none":
        losses = losses.new_zeros(labels.numel()).index_copy(0, kept, losses)
    return _reduced(losses, labels, reduction, ignore_index, num_items_in_batch)


def reference(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    labels: torch.Tensor,
    softcap: float | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    num_items_in_batch: int | float | torch.Tensor | None = None,
    *,
    out_features: int | None = None,
    packing: str | None = None,
) -> torch.Tensor:
    """`linear_cross_entropy` in plain torch, with all logits."""
    if packing is not None:
        assert out_features is not None  # required with packing
        weight = unpack(weight, out_features, hidden.shape[-1], packing)
    logits = linear(hidden, weight.to(hidden.dtype)).float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=ignore_index, reduction="none"
    )
    return _reduced(losses, labels, reduction, ignore_index, num_items_in_batch)


def _reduced(
    losses: torch.Tensor,
    labels: torch.Tensor,
    reduction: str,
    ignore_index: int,
    count: int | float | torch.Tensor | None,
) -> torch.Tensor:
    """The result of losses [N]: of all rows for "none", of those with labels at least else."""
    if reduction == "none":
        return losses.view(labels.shape)
    total = losses.sum()
    if reduction == "sum":
        return total
    if count is None:
        count = (labels != ignore_index).sum()
    elif isinstance(count, torch.Tensor):
        count = count.to(labels.device, torch.float32).reshape(())
    return total / count


def _known(labels: torch.Tensor, ignore_index: int, vocabulary: int) -> torch.Tensor:
    """Which labels are ignore_index or of the vocabulary."""
    return (labels == ignore_index) | ((labels >= 0) & (labels < vocabulary))


def _reads_labels(labels: torch.Tensor) -> bool:
    """Whether values are at hand: not while compiling, nor on the meta device."""
    return not torch.compiler.is_compiling() and not labels.is_meta


def _check(hidden, head, labels, softcap, reduction, ignore_index, num_items_in_batch) -> None:
    op = "linear_cross_entropy"
    check_tensors(op, hidden=hidden)
    check_dtype(op, "labels", labels, torch.int64)
    check_device(op, "labels", labels, "hidden", hidden)
    if isinstance(ignore_index, bool) or not isinstance(ignore_index, int):
        raise TypeError(f"{op}: ignore_index must be an int, got {type(ignore_index).__name__}")
    if not -(2**63) <= ignore_index < 2**63:
        raise ValueError(f"{op}: ignore_index must be an int64, got {ignore_index}")
    if hidden.dim() == 0:
        raise ValueError(f"{op}: hidden must have at least one dimension")
    head.check(op, hidden)
    if labels.shape != hidden.shape[:-1]:
        raise ValueError(
            f"{op}: labels must be {list(hidden.shape[:-1])} for hidden {list(hidden.shape)}, "
            f"got {list(labels.shape)}"
        )
    _check_options(op, softcap, reduction, num_items_in_batch)
    if not _reads_labels(labels):
        return
    known = _known(labels, ignore_index, head.vocabulary)
    if not bool(known.all()):
        raise ValueError(
            f"{op}: labels must be {ignore_index} or within the vocabulary (0 to "
            f"{head.vocabulary - 1}), got {labels[~known][0]}"
        )


def _check_options(op: str, softcap, reduction, num_items_in_batch) -> None:
    if softcap is not None:
        check_number(op, "softcap", softcap, "a number or None")
        if not FLOAT32.tiny <= softcap <= FLOAT32.max:
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
    if isinstance(count, torch.Tensor):
        if count.dtype == torch.bool or count.is_complex():
            raise TypeError(f"{op}: num_items_in_batch must be a number, got {dtype_name(count)}")
        if count.numel() != 1:
            raise ValueError(
                f"{op}: num_items_in_batch must be one number, got {list(count.shape)}"
            )
        if not _reads_labels(count):
            return
    if not 0 < count <= FLOAT32.max:
        raise ValueError(f"{op}: num_items_in_batch must be above 0 and finite, got {count}")


class _Losses(torch.autograd.Function):
    """Losses of rows, with the gradient of hidden at once where weight is frozen."""

    @staticmethod
    def forward(
        ctx,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        out_features: int | None,
        packing: str | None,
        targets: torch.Tensor,
        softcap: float,
        anchor: torch.Tensor | None,
    ) -> torch.Tensor:
        """hidden [N, in], weight [vocabulary, in] or packed, targets int64 [N] -> float32 [N]. The
        anchor, none of hidden's rows, is given where weight is frozen.
        """
        compute = _losses_op if torch.compiler.is_compiling() else _losses
        head = weight, out_features, packing
        losses, gradient = compute(hidden, *head, targets, softcap, anchor is not None)
        ctx.softcap = softcap
        saved = (hidden, weight, targets) if anchor is None else (gradient, anchor)
        ctx.save_for_backward(*saved)
        return losses

    @staticmethod
    def backward(ctx, grad):
        saved, source = ctx.saved_tensors, grad
        if len(saved) == 2:
            gradient, source = saved
            by_hidden, by_weight = _times(gradient, grad), None
        else:
            compute = _gradients_op if torch.compiler.is_compiling() else _gradients
            wanted = ctx.needs_input_grad[0]
            by_hidden, by_weight = compute(*saved, ctx.softcap, grad, wanted)
            by_hidden = by_hidden if wanted else None
        once = functools.partial(differentiable_once, "linear_cross_entropy", source)
        return once(by_hidden), once(by_weight), None, None, None, None, None


def _losses(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    out_features: int | None,
    packing: str | None,
    targets: torch.Tensor,
    softcap: float,
    frozen: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Losses of rows, and where weight is frozen `_factor` times their gradients of hidden."""
    losses = hidden.new_empty(len(hidden), dtype=torch.float32)
    gradient = _like_or_empty(hidden, frozen)
    factor = _factor(hidden) if frozen else 0.0
    head = Head(weight, out_features, packing).to(hidden.dtype)
    for rows, scores, target in _chunks(hidden, head, targets):
        losses[rows] = cross_entropy_(scores, target, softcap, factor)
        if frozen:
            gradient[rows] = head.gradient(scores, hidden.shape[-1])
        del scores  # before the next ones are made
    return losses, gradient


def _gradients(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    softcap: float,
    grad: torch.Tensor,
    wants_hidden: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of hidden, if wanted, and weight, from the logits once more."""
    by_hidden = _like_or_empty(hidden, wants_hidden)
    by_weight = torch.zeros_like(weight, dtype=torch.float32)
    factor, head = _factor(hidden), Head(weight, None, None).to(hidden.dtype)
    for rows, scores, target in _chunks(hidden, head, targets):
        cross_entropy_(scores, target, softcap, factor)
        if wants_hidden:
            by_hidden[rows] = _times(head.gradient(scores, hidden.shape[-1]), grad[rows])
        # Rows of hidden are scaled, not scores: a product of two dtypes makes float32 copies.
        by_weight += scores.T @ _times(hidden[rows], grad[rows])
        del scores
    return by_hidden, by_weight.to(weight.dtype)


# One node in a compiled graph: loops over chunks would be another graph for each number of rows.
_losses_op = torch.library.custom_op("mllama::_linear_losses", _losses, mutates_args=())
_gradients_op = torch.library.custom_op("mllama::_linear_gradients", _gradients, mutates_args=())


@_losses_op.register_fake
def _(hidden, weight, out_features, packing, targets, softcap, frozen):
    losses = hidden.new_empty(hidden.shape[0], dtype=torch.float32)  # len would fix the number
    return losses, _like_or_empty(hidden, frozen)


@_gradients_op.register_fake
def _(hidden, weight, targets, softcap, grad, wants_hidden):
    return _like_or_empty(hidden, wants_hidden), torch.empty_like(weight)


def _like_or_empty(hidden: torch.Tensor, wanted: bool) -> torch.Tensor:
    return torch.empty_like(hidden) if wanted else hidden.new_empty(0)


def _times(gradient: torch.Tensor, grad: torch.Tensor) -> torch.Tensor:
    """`_factor` times the gradients of rows' losses, with the gradients of these."""
    return (gradient * (grad / _factor(gradient))[:, None]).to(gradient.dtype)


def _factor(hidden: torch.Tensor) -> float:
    """What gradients of scores are stored times: float16 would lose small probabilities."""
    return 1024.0 if hidden.dtype == torch.float16 else 1.0


def _chunks(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor
) -> Iterator[tuple[slice, torch.Tensor, torch.Tensor]]:
    """Some rows, their logits and their targets; all of one dtype."""
    most = max(1, _CHUNK // (head.vocabulary * hidden.element_size()))
    # Of one size: products with few rows are slow.
    size = max(1, -(-len(hidden) // max(1, -(-len(hidden) // most))))
    for start in range(0, len(hidden), size):
        rows = slice(start, start + size)
        yield rows, head.logits(hidden[rows]), targets[rows]
