"""What the decoder asks of a key-value cache of transformers: how much it holds, and how many keys it will show.

A dynamic cache answers with its number of tokens; a static one shows all of its slots, filled or not, and keeps its length in a tensor
that its update changes in place, so the length is read and copied before any layer writes.
"""

import torch
from transformers import Cache


def check_cache(past_key_values: Cache | None) -> None:
    """Raise TypeError unless it is None or a cache of transformers."""
    if past_key_values is not None and not isinstance(past_key_values, Cache):
        raise TypeError(f"past_key_values must be a transformers Cache or None, got {type(past_key_values).__name__}")


def past_length(past_key_values: Cache | None) -> int | torch.Tensor:
    """Tokens the cache holds: an int, or a copy of a static cache's int64 tensor as [1]."""
    if past_key_values is None:
        return 0
    length = past_key_values.get_seq_length()
    return length.clone().reshape(1) if isinstance(length, torch.Tensor) else length


def key_length(past_key_values: Cache | None, new: int) -> int:
    """Keys that attention sees once `new` tokens were written: a static cache's whole size, or past + new."""
    return new if past_key_values is None else past_key_values.get_mask_sizes(new, 0)[0]
