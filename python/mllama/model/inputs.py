"""What `forward` is given: checks of ids, and what a mask over pictures comes down to."""

import torch
from transformers.modeling_outputs import ModelOutput


def rows_of_mask(
    mask: torch.Tensor | None, shape: torch.Size, past: int | torch.Tensor
) -> torch.Tensor | None:
    """The rows of a cross-attention mask for the new tokens: all of them, or those after the cached
    ones, the last repeated.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"cross_attention_mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dim() != 4 or mask.shape[0] != shape[0] or mask.shape[1] == 0:
        raise ValueError(
            f"cross_attention_mask must be [{shape[0]}, tokens, pictures, tiles], got {list(mask.shape)}"
        )
    if mask.shape[1] == shape[1]:
        return mask
    rows = torch.arange(shape[1], device=mask.device) + past
    return mask[:, rows.clamp(max=mask.shape[1] - 1)]


def check_blind(mask: torch.Tensor, placeholders: torch.Tensor) -> None:
    """Raise ValueError where a mask of fewer rows than there are tokens shows a placeholder [B, T]
    no picture: its rows stand elsewhere than the text's, as where padding was moved after the mask
    was made, and answers would see nothing.
    """
    if mask.shape[1] >= placeholders.shape[1] or torch.compiler.is_compiling():
        return
    blind = placeholders[:, : mask.shape[1]] & ~(mask != 0).flatten(2).any(-1)
    if blind.any():
        row, position = blind.nonzero()[0].tolist()
        raise ValueError(
            f"cross_attention_mask, of {mask.shape[1]} rows for {placeholders.shape[1]} tokens, shows the placeholder at"
            f" position {position} of row {row} no picture: was the padding moved after the mask was made?"
        )


def check_tile_features(
    image_features: torch.Tensor, rows: int, tokens_per_tile: int, size: int
) -> None:
    """Raise TypeError unless they are a floating tensor, ValueError unless they are [rows, pictures
    * tiles * tokens_per_tile, size].
    """
    if not isinstance(image_features, torch.Tensor) or not image_features.is_floating_point():
        kind = getattr(image_features, "dtype", type(image_features).__name__)
        raise TypeError(f"image_features must be a floating torch.Tensor, got {kind}")
    shape = image_features.shape
    if len(shape) != 3 or shape[0] != rows or shape[1] % tokens_per_tile or shape[2] != size:
        raise ValueError(
            f"image_features must be [{rows}, pictures x tiles x {tokens_per_tile}, {size}], got {list(shape)}"
        )


def check_ids(input_ids: torch.Tensor) -> None:
    """Raise TypeError unless they are integers, ValueError unless they are [B, T] with a token."""
    if not isinstance(input_ids, torch.Tensor) or input_ids.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"input_ids must be an int64 or int32 torch.Tensor, got {getattr(input_ids, 'dtype', type(input_ids).__name__)}"
        )
    if input_ids.dim() != 2 or input_ids.shape[1] == 0:
        raise ValueError(
            f"input_ids must be [batch, tokens] with at least one token, got {list(input_ids.shape)}"
        )


def check_range(input_ids: torch.Tensor, vocabulary: int) -> None:
    """An id outside the embedding matrix is an IndexError on every device, instead of a device-side
    assertion on some.
    """
    if torch.compiler.is_compiling() or input_ids.numel() == 0 or input_ids.is_meta:
        return
    low, high = (int(bound) for bound in input_ids.aminmax())
    if low < 0 or high >= vocabulary:
        raise IndexError(
            f"input_ids must lie within the vocabulary (0 to {vocabulary - 1}), got {low} to {high}"
        )


def one_of_images(
    pixel_values: torch.Tensor | None,
    image_features: torch.Tensor | None,
    mm_encoder_outputs: dict[str, ModelOutput] | None,
    cross_attention_states: torch.Tensor | None,
) -> torch.Tensor | None:
    """The features, given by one of several arguments; None where pixels or nothing are given.

    Raises:
        ValueError: several are given; mm_encoder_outputs holds another kind than images, or images
            without features of one shape.
        TypeError: mm_encoder_outputs is no dict of model outputs.
    """
    encoded = None if mm_encoder_outputs is None else encoded_images(mm_encoder_outputs)
    given = {
        "pixel_values": pixel_values,
        "image_features": image_features,
        "mm_encoder_outputs": encoded,
        "cross_attention_states": cross_attention_states,
    }
    names = [name for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"{' and '.join(names)} each give images: give one, not both")
    return image_features if encoded is None else encoded


def encoded_images(mm_encoder_outputs: dict[str, ModelOutput]) -> torch.Tensor | None:
    """The features [pictures, patches, hidden] in what transformers' `get_image_features` gave, by
    the name "image".
    """
    if not isinstance(mm_encoder_outputs, dict):
        raise TypeError(
            f"mm_encoder_outputs must be a dict, got {type(mm_encoder_outputs).__name__}"
        )
    if unknown := mm_encoder_outputs.keys() - {"image"}:
        raise ValueError(f'mm_encoder_outputs must have "image" alone, got {sorted(unknown)}')
    if (output := mm_encoder_outputs.get("image")) is None:
        return None
    features = getattr(output, "pooler_output", None)
    if isinstance(features, (list, tuple)) and len({one.shape for one in features}) == 1:
        features = torch.stack(list(features))
    if not isinstance(features, torch.Tensor):
        raise ValueError(
            'mm_encoder_outputs["image"].pooler_output must be features of one shape, a tensor or a list'
        )
    return features


def by_rows(cross_attention_states: torch.Tensor, rows: int) -> torch.Tensor:
    """[..., hidden] -> [rows, pictures * tiles * tokens, hidden].

    Raises:
        TypeError: no floating tensor.
        ValueError: they cannot be shared out to the rows.
    """
    if (
        not isinstance(cross_attention_states, torch.Tensor)
        or not cross_attention_states.is_floating_point()
    ):
        kind = getattr(cross_attention_states, "dtype", type(cross_attention_states).__name__)
        raise TypeError(f"cross_attention_states must be a floating torch.Tensor, got {kind}")
    shape = cross_attention_states.shape
    if not shape or cross_attention_states[..., 0].numel() % rows:
        raise ValueError(
            f"cross_attention_states must have as many features for each of {rows} rows, got {list(shape)}"
        )
    return cross_attention_states.reshape(rows, -1, shape[-1])
