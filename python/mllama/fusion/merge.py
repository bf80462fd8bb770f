"""Early fusion: which ids are picture placeholders, and features written in their place."""

import torch


def find_placeholder(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, per_picture: int, pictures: int
) -> int | None:
    """The id of the picture placeholder, told by how it stands: `per_picture` of it in a row for
    each picture.

    A candidate is an id whose every run of equal neighbours at unmasked positions of a row has a
    length that is a multiple of `per_picture`. Several candidates are told apart by their number,
    which must be `pictures * per_picture`.

    Args:
        input_ids: int [B, T].
        attention_mask: [B, T], zero where padded, or None.
        per_picture: placeholders of one picture.
        pictures: pictures of the whole batch.

    Returns:
        The id, or None where no id stands like that.

    Raises:
        ValueError: more than one id could be it.
    """
    seen = (
        torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is None
        else attention_mask.bool()
    )
    # The rows end to end, each closed by a marker, so that no run crosses from row to row or over a
    # padded position.
    marker = input_ids.min() - 1
    ids = torch.nn.functional.pad(
        input_ids.masked_fill(~seen, marker), (0, 1), value=int(marker)
    ).flatten()
    values, lengths = torch.unique_consecutive(ids, return_counts=True)
    broken = values[lengths % per_picture != 0]
    candidates = values[~torch.isin(values, broken) & (values != marker)].unique()
    if len(candidates) > 1:
        counts = torch.stack([(ids == candidate).sum() for candidate in candidates])
        candidates = candidates[counts == pictures * per_picture]
        if len(candidates) != 1:
            raise ValueError(
                f"image_token_index is not set and cannot be told from input_ids: {len(candidates) or 'no'} ids stand in runs of "
                f"{per_picture} for {pictures} pictures; set config.image_token_index"
            )
    return int(candidates[0]) if len(candidates) else None


def merge(
    inputs_embeds: torch.Tensor, placeholders: torch.Tensor, image_features: torch.Tensor
) -> torch.Tensor:
    """Write picture features at the placeholders, in row order.

    Args:
        inputs_embeds: [B, T, hidden].
        placeholders: bool [B, T], True at as many positions as there are features.
        image_features: [pictures, patches, hidden].

    Returns:
        [B, T, hidden], a new tensor in inputs_embeds' dtype.
    """
    return inputs_embeds.masked_scatter(
        placeholders.unsqueeze(-1), image_features.to(inputs_embeds.device, inputs_embeds.dtype)
    )
