"""The loss of next-token prediction."""

import torch
from torch import nn


def next_token_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    shape: torch.Size,
    attention_mask: torch.Tensor | None = None,
    placeholders: torch.Tensor | None = None,
    ignore_index: int = -100,
    num_items_in_batch: int | torch.Tensor | None = None,
) -> torch.Tensor:
    """Cross entropy in float32 of the logits at t against the label at t + 1.

    Args:
        logits: [B, T, vocabulary].
        labels: int [B, T]; `ignore_index`, placeholders and padding are not trained.
        shape: (B, T) of the input.
        attention_mask: [B, past + T], zero where padded, or None.
        placeholders: bool [B, T], where pictures stand, or None.
        ignore_index: the label that is not trained.
        num_items_in_batch: what the sum is divided by; None is the number of trained positions.

    Raises:
        TypeError: labels of another kind.
        ValueError: labels of another shape or outside the vocabulary; logits of some positions only.
    """
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"labels must be an integer torch.Tensor, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != shape:
        raise ValueError(f"labels must be {list(shape)}, one per token, got {list(labels.shape)}")
    if logits.shape[:2] != shape:
        raise ValueError("labels need the logits of every position; leave logits_to_keep at 0")
    labels = labels.to(logits.device, torch.long)
    if placeholders is not None:
        labels = labels.masked_fill(placeholders, ignore_index)
    labels = labels[:, 1:]
    if attention_mask is not None:  # a padded position is neither a target nor a place to predict from
        seen = attention_mask[:, -shape[1] :] != 0
        labels = labels.masked_fill(~(seen[:, 1:] & seen[:, :-1]), ignore_index)
    trained = labels != ignore_index
    vocabulary = logits.shape[-1]
    if not torch.compiler.is_compiling() and bool((trained & ((labels < 0) | (labels >= vocabulary))).any()):
        raise ValueError(
            f"labels must be {ignore_index} or within the vocabulary (0 to {vocabulary - 1}), got {labels.min()} to {labels.max()}"
        )
    total = nn.functional.cross_entropy(
        logits[:, :-1].reshape(-1, vocabulary).float(), labels.reshape(-1), ignore_index=ignore_index, reduction="sum"
    )
    count = trained.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)
