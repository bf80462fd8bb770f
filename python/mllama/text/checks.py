"""Checks of a decoder's inputs, shared with the models around it."""

import torch

from mllama.nn.checks import check_floating, check_integers
from mllama.ops._dispatch import FLOAT_DTYPES


def check_mask(attention_mask: torch.Tensor | None) -> None:
    """Raise TypeError unless the mask is None or a tensor, bool or floating if 4-D; ValueError
    unless it is 2-D or 4-D.
    """
    if attention_mask is None:
        return
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(
            f"attention_mask must be a torch.Tensor or None, got {type(attention_mask).__name__}"
        )
    if attention_mask.dim() not in (2, 4):
        raise ValueError(
            "attention_mask must be [batch, past + new tokens], zero where padded, or "
            f"[batch, 1 or heads, new tokens, keys]; got {list(attention_mask.shape)}"
        )
    if attention_mask.dim() == 4 and attention_mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        raise TypeError(
            "attention_mask of 4 dimensions must be bool, True where a key is visible, or float32, "
            f"bfloat16 or float16, added to the scores; got {attention_mask.dtype}"
        )


def split_mask(
    attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(the mask if it is 2-D, for padding, the mask if it is 4-D); at least one is None."""
    if attention_mask is None or attention_mask.dim() == 2:
        return attention_mask, None
    return None, attention_mask


def check_text(
    input_ids: torch.Tensor | None, inputs_embeds: torch.Tensor | None, hidden_size: int
) -> None:
    """Raise ValueError or TypeError unless there are ids [B, T] or embeddings [B, T, hidden]."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give exactly one of input_ids and inputs_embeds")
    if input_ids is not None:
        check_ids(input_ids)
    else:
        check_embeddings(inputs_embeds, hidden_size)  # type: ignore[arg-type]


def check_ids(input_ids: torch.Tensor) -> None:
    """Raise TypeError unless they are integers, ValueError unless they are [B, T] with a token."""
    check_integers("input_ids", input_ids)
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            "input_ids must be [batch, tokens] with at least one token, "
            f"got {list(input_ids.shape)}"
        )


def check_embeddings(inputs_embeds: torch.Tensor, size: int) -> None:
    """Raise TypeError unless inputs_embeds is a floating tensor, ValueError unless it is [B, T,
    size] with T of at least 1.
    """
    check_floating("inputs_embeds", inputs_embeds)
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[1] == 0 or inputs_embeds.shape[2] != size:
        raise ValueError(
            f"inputs_embeds must be [batch, tokens, {size}] with at least one token, "
            f"got {list(inputs_embeds.shape)}"
        )
