"""Checks of a session's arguments."""

import torch


def check_room(context: int, prompt: int) -> int:
    """Number of tokens that a prompt leaves for its answer.

    Raises:
        ValueError: there are none.
    """
    if prompt >= context:
        raise ValueError(
            f"the prompt is {prompt} tokens long; this model takes {context}, answer included"
        )
    return context - prompt


def check_padding(mask: torch.Tensor, shape: torch.Size) -> None:
    """Raise ValueError unless a mask is [B, T] and its rows are zeros and then ones."""
    if mask.shape != shape:
        raise ValueError(f"attention_mask must be {list(shape)}, got {list(mask.shape)}")
    keep = mask != 0
    if not keep[:, -1].all() or (keep[:, :-1] & ~keep[:, 1:]).any():
        raise ValueError("attention_mask must be zero on the left only: pad rows on the left")
