"""PaliGemma's token types: which part of a row is a prompt that is seen both ways."""

import torch

from mllama.text.packing import ends_of, next_place


def count_prefix(
    token_type_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shape: torch.Size,
    first_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """How many positions of each row, its padding on the left included, come before the first of
    type 1.

    Args:
        token_type_ids: int [B, T], 0 for a row's prompt and then 1.
        attention_mask: [B, T], zero where padded (types there do not matter), or None.
        shape: (B, T), of the tokens.
        first_key: int64 [B or 1, T], of rows that hold several sequences, each with its prompt:
            where that of each position begins.

    Returns:
        int64 [B]: what every position of its row sees, in `Decoder.forward`. With `first_key` [B,
            T], where the prompt of each position's
        sequence ends.

    Raises:
        TypeError: types that are no integers.
        ValueError: types of another shape, or a 0 after a 1.
    """
    if not isinstance(token_type_ids, torch.Tensor) or token_type_ids.is_floating_point():
        raise TypeError(
            f"token_type_ids must be an integer torch.Tensor, got {getattr(token_type_ids, 'dtype', type(token_type_ids).__name__)}"
        )
    if token_type_ids.shape != shape:
        raise ValueError(
            f"token_type_ids must be {list(shape)}, one per token, got {list(token_type_ids.shape)}"
        )
    said = token_type_ids != 0
    if first_key is None:
        length = (said.cumsum(-1) == 0).sum(-1, keepdim=True)
    else:
        first_key = first_key.expand(shape)
        length = torch.minimum(next_place(said).gather(1, first_key), ends_of(first_key))
    if not torch.compiler.is_compiling():
        late = ~said & (torch.arange(shape[1], device=said.device) >= length)
        if attention_mask is not None:
            late &= attention_mask != 0
        if bool(late.any()):
            raise ValueError(
                "token_type_ids must be 0 for a row's prompt and then 1 up to its end; here a 0 follows a 1"
            )
    return length.squeeze(1) if first_key is None else length
