"""Converts the arguments of transformers' calls to `ModelInputs`."""

from typing import Any, NamedTuple

import torch
from transformers import Cache, DynamicCache, PretrainedConfig
from transformers.modeling_outputs import ModelOutput

from mllama.fusion.base import ModelInputs
from mllama.hf.cache import TransformersCache, check_cache
from mllama.nn.checks import check_floating
from mllama.text.checks import check_mask, split_mask
from mllama.text.packing import find_sequences, go_back


class PackedRows(NamedTuple):
    """DataCollatorWithFlattening's description of packed rows: see `forward`."""

    cu_seq_lens_q: torch.Tensor | None = None
    cu_seq_lens_k: torch.Tensor | None = None
    max_length_q: int | None = None
    max_length_k: int | None = None
    seq_idx: torch.Tensor | None = None


def set_extra_outputs(
    inputs: ModelInputs,
    config: PretrainedConfig,
    output_attentions: bool | None,
    output_hidden_states: bool | None,
) -> None:
    """Resolve which outputs to return besides logits: by the call, else the config's default."""
    text = getattr(config, "text_config", config)
    if output_attentions is None:
        output_attentions = config.output_attentions or text.output_attentions
    if output_hidden_states is None:
        output_hidden_states = config.output_hidden_states or text.output_hidden_states
    inputs.output_attentions = bool(output_attentions)
    inputs.output_hidden_states = bool(output_hidden_states)


def set_cache_and_positions(
    model: Any,
    inputs: ModelInputs,
    cache: Cache | None,
    use_cache: bool | None,
    position_ids: torch.Tensor | None,
    packing: PackedRows,
) -> Cache | None:
    """Set cache, position_ids and first_key; return the transformers cache, a new one if the call
    needs one.

    Raises:
        TypeError, ValueError: cache, mask or positions are invalid, or given with packed rows.
    """
    check_cache(cache)
    check_mask(inputs.attention_mask)
    shape, has_mask = inputs.shape, inputs.attention_mask is not None
    padding_mask, _ = split_mask(inputs.attention_mask)
    if padding_mask is not None and (
        padding_mask.shape[0] != shape[0] or padding_mask.shape[1] < shape[1]
    ):
        raise ValueError(
            f"attention_mask must be [{shape[0]}, past + {shape[1]}], for all tokens, "
            f"got {list(padding_mask.shape)}"
        )
    if use_cache is None:
        described = any(value is not None for value in packing)
        packed = not has_mask and (go_back(position_ids) or described)
        use_cache = not packed and _wants_cache(model)
    obstacles = {
        "attention_mask": has_mask,
        "cache": cache is not None,
        "use_cache": bool(use_cache),
    }
    obstacle = next((name for name, given in obstacles.items() if given), None)
    inputs.position_ids, inputs.first_key = find_sequences(
        shape, position_ids, obstacle, **packing._asdict()
    )
    if use_cache and cache is None:
        cache = DynamicCache()
    if cache is None:
        return None
    inputs.cache = TransformersCache(cache, model.spec.text)
    if model.training and model.is_activation_checkpointing:  # its layers get no cache
        raise ValueError(
            "cache cannot be used while activations are checkpointed: call model.eval(), or set "
            "use_cache=False"
        )
    return cache


def _wants_cache(model: Any) -> bool:
    """Whether a call returns a cache by default."""
    text = getattr(model.config, "text_config", model.config)
    return not model.training and text.use_cache and getattr(model.config, "use_cache", True)


def one_of_images(
    pixel_values: torch.Tensor | None,
    image_features: torch.Tensor | None,
    mm_encoder_outputs: dict[str, ModelOutput] | None,
    cross_attention_states: torch.Tensor | None,
) -> torch.Tensor | None:
    """The image features from one of several arguments; None if pixels or nothing are given.

    Raises:
        ValueError: several are given; mm_encoder_outputs has another key than "image", or features
            of different shapes.
        TypeError: mm_encoder_outputs is not a dict of model outputs.
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
    """The features [images, patches, hidden] in the output of transformers' `get_image_features`,
    under the key "image".
    """
    if not isinstance(mm_encoder_outputs, dict):
        raise TypeError(
            f"mm_encoder_outputs must be a dict, got {type(mm_encoder_outputs).__name__}"
        )
    if unknown := mm_encoder_outputs.keys() - {"image"}:
        raise ValueError(f'mm_encoder_outputs must have only "image", got {sorted(unknown)}')
    if (output := mm_encoder_outputs.get("image")) is None:
        return None
    features = getattr(output, "pooler_output", None)
    if isinstance(features, (list, tuple)) and len({one.shape for one in features}) == 1:
        features = torch.stack(list(features))
    if not isinstance(features, torch.Tensor):
        raise ValueError(
            'mm_encoder_outputs["image"].pooler_output must be features of one shape, a tensor or '
            "a list"
        )
    return features


def by_rows(cross_attention_states: torch.Tensor, rows: int) -> torch.Tensor:
    """[..., hidden] -> [rows, images * tiles * tokens, hidden].

    Raises:
        TypeError: not a floating tensor.
        ValueError: the features cannot be divided among the rows.
    """
    check_floating("cross_attention_states", cross_attention_states)
    shape = cross_attention_states.shape
    if not shape or cross_attention_states[..., 0].numel() % rows:
        raise ValueError(
            f"cross_attention_states must have as many features for each of {rows} rows, "
            f"got {list(shape)}"
        )
    return cross_attention_states.reshape(rows, -1, shape[-1])
