"""Visual tokens before the text. What comes with such a text (mask, labels, positions) is the
text's own, and is made longer here.

How many visual tokens a cache begins with is written on the cache: later calls say nothing of them.
"""

import torch
from torch.nn.functional import pad


def pictures_per_row(pictures: int, rows: int) -> int:
    """How many of the pictures every row has.

    Raises:
        ValueError: they cannot be shared out evenly.
    """
    if rows == 0 or pictures % rows:
        raise ValueError(
            f"pictures without placeholders must be as many for every row, got {pictures} for {rows} rows"
        )
    return pictures // rows


def share_out(image_features: torch.Tensor, rows: int) -> torch.Tensor:
    """[pictures, patches, hidden] -> [rows, pictures per row * patches, hidden]; as
    `pictures_per_row`.
    """
    return image_features.unflatten(
        0, (rows, pictures_per_row(image_features.shape[0], rows))
    ).flatten(1, 2)


def check_texts_own(name: str, tensor: torch.Tensor | None, length: int, visual: int) -> None:
    """Raise ValueError unless what comes with a text, [B, length], leaves out the visual tokens
    before it.
    """
    if isinstance(tensor, torch.Tensor) and tensor.shape[1:] != (length,):
        raise ValueError(
            f"{name} must be [batch, {length}], the text's own without the {visual} visual tokens before it, got {list(tensor.shape)}"
        )


def lengthen(tensor: torch.Tensor | None, count: int, value: int) -> torch.Tensor | None:
    """[B, T] -> [B, count + T], `value` in front. What is no tensor is left to those who read it."""
    return pad(tensor, (count, 0), value=value) if isinstance(tensor, torch.Tensor) else tensor


def shift_positions(position_ids: torch.Tensor | None, held: int, new: int) -> torch.Tensor | None:
    """Positions of a text [B, T] -> behind `held` visual tokens in the cache and `new` ones, which
    come first: [B, new + T].
    """
    if not isinstance(position_ids, torch.Tensor):  # left to those who read it
        return position_ids
    front = torch.arange(new, device=position_ids.device, dtype=position_ids.dtype).expand(
        position_ids.shape[0], new
    )
    return torch.cat([front, position_ids + held + new], dim=1)
