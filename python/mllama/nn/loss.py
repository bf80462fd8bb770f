"""The loss of next-token prediction."""

import math
import numbers
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import distributed, nn
from torch.nn.functional import cross_entropy, pad

from mllama.nn.packed import PackedLinear
from mllama.ops import linear_cross_entropy
from mllama.ops._dispatch import differentiable_once
from mllama.ops.cross_entropy import cross_entropy_


def counted_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    shape: torch.Size,
    attention_mask: torch.Tensor | None = None,
    placeholders: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross entropy in float32 of the logits at t against the label at t + 1, and the number of
    trained labels.

    Stores no copy of the logits; the gradient has their dtype. Cannot be differentiated twice.

    Args:
        logits: [B, T, vocabulary].
        labels: int [B, T]; `ignore_index`, placeholders and padding are not trained.
        shape: (B, T) of the input.
        attention_mask: [B, past + T], zero where padded, or None.
        placeholders: bool [B, T], positions of images, or None.
        ignore_index: label that is not trained.
        num_items_in_batch: divisor of the sum. Default: the number of trained positions.

    Returns:
        The loss, float32 scalar, and the number of trained positions, int64 scalar. If none is
        trained, the loss is 0 where other batches of the step may have some: `num_items_in_batch`
        above 0, several processes, or accelerate's gradient accumulation. With
        `num_items_in_batch` 0 and no gradient (Trainer's evaluation) it is NaN, as in transformers.

    Raises:
        TypeError: labels or num_items_in_batch have the wrong type.
        ValueError: labels have the wrong shape or lie outside the vocabulary; logits cover some
            positions only; no label is trained, here or in the rest of the step;
            num_items_in_batch is below 0 or not finite, or 0 although labels are trained.
    """
    vocabulary = logits.shape[-1]
    targets = _targets(
        labels, logits.device, shape, vocabulary, attention_mask, placeholders, ignore_index
    )
    if logits.shape[:2] != shape:
        raise ValueError("labels need the logits of every position; leave logits_to_keep at 0")
    scores = logits.reshape(-1, vocabulary)  # the last position stays, ignored: a slice would copy
    if torch.compiler.is_compiling():
        # the number of trained rows is unknown while compiling, and the compiler fuses this
        total = cross_entropy(scores.float(), targets, ignore_index=ignore_index, reduction="sum")
    else:
        rows = (targets != ignore_index).nonzero().squeeze(1)
        total = _CrossEntropySum.apply(scores, rows, targets[rows])
    return _divided(total, targets, ignore_index, num_items_in_batch)


def counted_loss_of_states(
    states: torch.Tensor,
    head: nn.Linear | PackedLinear,
    softcap: float | None,
    labels: torch.Tensor,
    shape: torch.Size,
    attention_mask: torch.Tensor | None = None,
    placeholders: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`counted_loss` of the logits softcap(states head'), which are never all in memory
    (`mllama.ops.linear_cross_entropy`).

    Args:
        states: [B, T, hidden].
        head: without a bias.
        softcap: see `linear_cross_entropy`.
    """
    targets = _targets(
        labels, states.device, shape, head.out_features, attention_mask, placeholders, ignore_index
    )
    weight: dict[str, Any] = (
        {"weight": head.packed, "out_features": head.out_features, "packing": head.packing}
        if isinstance(head, PackedLinear)
        else {"weight": head.weight}
    )
    total = linear_cross_entropy(
        states.flatten(0, 1),
        labels=targets,
        softcap=softcap,
        reduction="sum",
        ignore_index=ignore_index,
        **weight,
    )
    return _divided(total, targets, ignore_index, num_items_in_batch)


def _targets(
    labels: torch.Tensor,
    device: torch.device,
    shape: torch.Size,
    vocabulary: int,
    attention_mask: torch.Tensor | None,
    placeholders: torch.Tensor | None,
    ignore_index: int,
) -> torch.Tensor:
    """The label of each position's next one, int64 [B * T] on the device; `ignore_index` where it
    is not trained.
    """
    if (
        not isinstance(labels, torch.Tensor)
        or labels.is_floating_point()
        or labels.dtype == torch.bool
    ):
        raise TypeError(
            "labels must be an integer torch.Tensor, "
            f"got {getattr(labels, 'dtype', type(labels).__name__)}"
        )
    if labels.shape != shape:
        raise ValueError(f"labels must be {list(shape)}, one per token, got {list(labels.shape)}")
    labels = labels.to(device, torch.long)
    if placeholders is not None:
        labels = labels.masked_fill(placeholders, ignore_index)
    labels = labels[:, 1:]
    if (
        attention_mask is not None
    ):  # a padded position is neither a target nor a position to predict from
        keep_mask = attention_mask[:, -shape[1] :] != 0  # (B, T)
        labels = labels.masked_fill(~(keep_mask[:, 1:] & keep_mask[:, :-1]), ignore_index)
    known = (labels == ignore_index) | ((labels >= 0) & (labels < vocabulary))
    if not torch.compiler.is_compiling() and not bool(known.all()):
        raise ValueError(
            f"labels must be {ignore_index} or within the vocabulary (0 to {vocabulary - 1}), "
            f"got {labels[~known][0]}"
        )
    return pad(labels, (0, 1), value=ignore_index).flatten()


def _divided(
    total: torch.Tensor,
    targets: torch.Tensor,
    ignore_index: int,
    num_items_in_batch: int | torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The loss and the number of trained positions."""
    found = (targets != ignore_index).sum()
    count = found if num_items_in_batch is None else num_items_in_batch
    if not torch.compiler.is_compiling():
        trained = int(found)
        if num_items_in_batch is not None:
            _check_count(num_items_in_batch, trained)
        if not trained:
            count = _count_of_none(count, num_items_in_batch is None, ignore_index)
    if isinstance(count, torch.Tensor):
        count = count.to(total.device, torch.float32).reshape(())
    return total / count, found


def _check_count(count: int | torch.Tensor, trained: int) -> None:
    """Raise TypeError unless it is one number, ValueError unless it can divide the sum over the
    trained labels.
    """
    if isinstance(count, bool) or not isinstance(count, (numbers.Real, torch.Tensor)):
        raise TypeError(
            f"num_items_in_batch must be a number or a tensor of one, got {type(count).__name__}"
        )
    if isinstance(count, torch.Tensor):
        if count.dtype == torch.bool or count.is_complex():
            raise TypeError(f"num_items_in_batch must be a number, got {count.dtype}")
        if count.numel() != 1:
            raise ValueError(f"num_items_in_batch must be one number, got {list(count.shape)}")
    if not 0 <= count < math.inf or not count and trained:
        raise ValueError(
            "num_items_in_batch must be the total number of trained labels, at least 1 with "
            f"{trained} here, got {count}"
        )


def _count_of_none(count: int | torch.Tensor, alone: bool, ignore_index: int) -> int | torch.Tensor:
    """The divisor if no label is trained here: `count`, or 1 if other batches may have labels.

    Raises:
        ValueError: no label is trained, here or elsewhere.
    """
    if alone and _has_other_batches():
        return 1
    if not alone and (count > 0 or not torch.is_grad_enabled()):
        return count
    raise ValueError(
        f"labels have nothing to train on: every one is {ignore_index}, padding, an image "
        "placeholder or the first of its row. If another batch of the same step has labels, pass "
        "their total number as num_items_in_batch"
    )


def _has_other_batches() -> bool:
    """Whether a step may span several batches: of other processes, or accumulated by accelerate,
    whose state is global to the process.
    """
    if (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    ):
        return True
    state = getattr(sys.modules.get("accelerate.state"), "GradientState", None)
    return bool(state is not None and state._shared_state) and state().num_steps > 1


class _CrossEntropySum(torch.autograd.Function):
    """Sum of the cross entropy of some rows in float32. It saves its arguments only; backward
    recomputes the softmax.
    """

    @staticmethod
    def forward(scores: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """scores [N, vocabulary], rows int64 [n], targets int64 [n] -> float32 []."""
        losses = [cross_entropy_(x, target) for _, x, target in _chunks(scores, rows, targets)]
        return torch.cat([scores.new_zeros(1, dtype=torch.float32), *losses]).sum()

    @staticmethod
    def setup_context(ctx, inputs: tuple, output: torch.Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        scores, rows, targets = ctx.saved_tensors
        with torch.no_grad():
            gradient = torch.zeros_like(scores)
            for part, x, target in _chunks(scores, rows, targets):
                cross_entropy_(x, target, gradient=1.0)
                gradient.index_copy_(0, part, (x * grad).to(gradient.dtype))
        return differentiable_once("next_token_loss", scores, gradient), None, None


def _chunks(
    scores: torch.Tensor, rows: torch.Tensor, targets: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """(rows, a copy of their scores in float32, their targets), in chunks that fit a core's caches
    or keep a device busy.
    """
    size = max(1, (1 << 20 if scores.is_cpu else 1 << 24) // scores.shape[-1])
    for part, target in zip(rows.split(size), targets.split(size), strict=True):
        yield part, scores.index_select(0, part).float(), target.contiguous()
