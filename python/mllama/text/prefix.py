"""PaliGemma's token types: the part of a row that attends in both directions."""

import torch

from mllama.text.packing import ends_of, next_place


def count_prefix(
    token_type_ids: torch.Tensor,
    attention_mask: torch.Tensor | None,
    shape: torch.Size,
    first_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """Length of each row's prompt including left padding: positions before the first type 1.

    Args:
        token_type_ids: int [B, T], 0 for the prompt, 1 for the completion.
        attention_mask: [B, T], zero where padded (types there are ignored), or None.
        shape: (B, T) of the tokens.
        first_key: int64 [B or 1, T], start of each position's sequence, for packed rows with
            several prompts.

    Returns:
        int64 [B], as `Decoder.forward` takes it. With `first_key`, [B, T]: the end of the prompt of
        each position's sequence.

    Raises:
        TypeError: types are not integers.
        ValueError: types have the wrong shape, or a 0 after a 1.
    """
    if not isinstance(token_type_ids, torch.Tensor) or token_type_ids.is_floating_point():
        raise TypeError(
            "token_type_ids must be an integer torch.Tensor, "
            f"got {getattr(token_type_ids, 'dtype', type(token_type_ids).__name__)}"
        )
    if token_type_ids.shape != shape:
        raise ValueError(
            f"token_type_ids must be {list(shape)}, one per token, got {list(token_type_ids.shape)}"
        )
    completion = token_type_ids != 0
    if first_key is None:
        length = (completion.cumsum(-1) == 0).sum(-1, keepdim=True)
    else:
        first_key = first_key.expand(shape)
        length = torch.minimum(next_place(completion).gather(1, first_key), ends_of(first_key))
    if not torch.compiler.is_compiling():
        late = ~completion & (torch.arange(shape[1], device=completion.device) >= length)
        if attention_mask is not None:
            late &= attention_mask != 0
        if bool(late.any()):
            raise ValueError(
                "token_type_ids must be 0 for a row's prompt and then 1 up to its end; "
                "here a 0 follows a 1"
            )
    return length.squeeze(1) if first_key is None else length
