"""Masks of [T, S] or more, as older scripts hand to their attention, told in the few numbers that
the attention operator takes.
"""

import torch

_HIDDEN = -1e4  # and less: an added number that leaves nothing of a probability, in float16 too


def hidden_mask(mask: torch.Tensor, queries: int, past: int) -> torch.Tensor:
    """What a mask with True at hidden keys lets be seen.

    Args:
        mask: bool, broadcastable to [B, heads, queries, keys], where keys are past + queries, or
            queries alone: then all the past is seen. Numbers 0 and 1 are False and True; other
            floats are added to the scores, so that 0 is seen and -inf hidden.
        queries: new tokens.
        past: keys before them.

    Returns:
        bool, True where seen, or float32 to be added; [B or 1, heads or 1, queries or 1, keys].

    Raises:
        TypeError: no tensor, or a dtype that is none of these.
        ValueError: another shape; numbers that are neither kind; 0 and 1 that hide every key from a
            query, as the opposite convention does.
    """
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask must be a torch.Tensor or None, got {type(mask).__name__}")
    if mask.dtype == torch.bool:
        return ~_shaped(mask, queries, past)
    mask = _shaped(mask, queries, past)
    if bool(((mask == 0) | (mask == 1)).all()):
        seen = mask == 0
        if not seen.any(-1).all():
            raise ValueError(
                "mask hides every key from a query: it is True, or 1, where a key is hidden, not where it is seen"
            )
        return seen
    if not mask.is_floating_point():
        raise ValueError(
            f"mask must be boolean, True where a key is hidden; got {mask.dtype} with values other than 0 and 1"
        )
    return added_mask(mask)


def added_mask(mask: torch.Tensor) -> torch.Tensor:
    """What numbers to be added to the scores let be seen: bool where they are 0 or hide, else
    float32.

    Raises:
        ValueError: a number above 0, or NaN.
    """
    if not bool((mask <= 0).all()):
        raise ValueError(
            "mask of numbers to be added to the scores must be 0 where a key is seen, below 0 or -inf where not"
        )
    seen = mask == 0
    return seen if bool((seen | (mask <= _HIDDEN)).all()) else mask.float()


def _shaped(mask: torch.Tensor, queries: int, past: int) -> torch.Tensor:
    keys = past + queries
    if (
        mask.dim() not in (2, 3, 4)
        or mask.shape[-2] not in (1, queries)
        or mask.shape[-1] not in (queries, keys)
    ):
        raise ValueError(
            f"mask must be [{queries}, {keys}], or [batch, heads, {queries}, {keys}], got {list(mask.shape)}"
        )
    mask = mask[None, None] if mask.dim() == 2 else mask[:, None] if mask.dim() == 3 else mask
    return mask if mask.shape[-1] == keys else torch.nn.functional.pad(mask, (past, 0))


def causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """bool [queries, keys], True where seen: the last query sees all keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def key_mask(seen: torch.Tensor, batch: int, heads: int, queries: int) -> torch.Tensor | None:
    """What the operator, which is causal, needs beside causality.

    Args:
        seen: of `hidden_mask` or `added_mask`.

    Returns:
        None where `seen` is causality alone, bool [B, keys] where it is that and padding, `seen`
        itself where it is anything else.

    Raises:
        ValueError: its batch or heads are others.
    """
    if seen.shape[0] not in (1, batch) or seen.shape[1] not in (1, heads):
        raise ValueError(
            f"mask must be for a batch of 1 or {batch} and 1 or {heads} heads, got {list(seen.shape)}"
        )
    if seen.dtype == torch.bool and seen.shape[1] == 1:
        causal = causal_mask(queries, seen.shape[-1], seen.device)
        keys_seen = (seen & causal).any(-2)[:, 0]
        if torch.equal(seen.expand(-1, -1, queries, -1)[:, 0], causal & keys_seen[:, None]):
            return None if keys_seen.all() else keys_seen.expand(batch, -1)
    return seen
