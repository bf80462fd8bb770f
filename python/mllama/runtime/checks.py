"""Checks of a session's arguments."""

import numbers
from typing import Any

import torch


def check_ends(given: Any) -> frozenset[int]:
    """The ids of eos_token_id: an id, several, or None.

    Raises:
        TypeError: it is something else.
    """
    if given is None:
        return frozenset()
    several = isinstance(given, (list, tuple, set, frozenset))
    ends: list[Any] = list(given) if several else [given]
    if not all(isinstance(end, numbers.Integral) and not isinstance(end, bool) for end in ends):
        raise TypeError(f"eos_token_id must be an int or a list of them, got {given!r}")
    return frozenset(int(end) for end in ends)


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
