"""Changes of a config after its model was built: which ones apply, and which are rejected."""

import copy
from dataclasses import fields as spec_fields
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from mllama.config.spec import TextSpec, TiledVisionSpec, VisionSpec
from mllama.hf.config_objects import compose

# Fields of a spec that are read when a model is called; the others are built in.
_LIVE = {"max_position_embeddings", "tie_word_embeddings"}
_JOINING = {
    *("projector", "projection_dim", "projector_hidden_act", "multimodal_projector_bias"),
    *("vision_feature", "fusion", "image_pooling", "cross_attention_every"),
    *("num_image_tokens", "dropout", "use_bidirectional_attention"),
}
# Fields of a decoder's layers.
_LAYERS = {
    *("num_hidden_layers", "rope_parameters", "cross_attention_layers", "layer_types"),
    *("sliding_window", "query_pre_attn_scalar", "attn_logit_softcapping", "hidden_activation"),
}
BUILT_FROM = (_JOINING | _LAYERS) | (
    {field.name for spec in (TextSpec, VisionSpec, TiledVisionSpec) for field in spec_fields(spec)}
    - _LIVE
)
"""Fields of configs and their parts that a model is built from. Changing them later has no effect
on it.
"""


def remember_config(model: PreTrainedModel) -> None:
    """Store the config that a model is built from, for `check_built`."""
    model._built_config = {
        part: {
            name: value if isinstance(value, PretrainedConfig) else copy.deepcopy(value)
            for name, value in fields.items()
        }
        for part, fields in _parts(model.config).items()
    }


def check_built(model: PreTrainedModel) -> None:
    """Apply changes of the config since the model was built: fields that are read at call time
    apply, others are rejected.

    A compiled model keeps the config of its last call before compilation.

    Raises:
        ValueError: a field that the model was built from was changed.
    """
    if torch.compiler.is_compiling():
        return
    parts, before = _parts(model.config), model._built_config
    if parts == before:
        return
    for part, fields in parts.items():
        for name in BUILT_FROM & fields.keys():
            was = before.get(part, {}).get(name)
            if fields[name] != was and not _is_fewer_layers(model, part, name, fields[name]):
                field = f"{part}.{name}" if part else name
                raise ValueError(
                    f"config: {field} was {was!r} when the model was built and cannot become "
                    f"{fields[name]!r}: build a new model"
                )
    if model.spec.text is not None:
        spec = compose(model.config)
        if spec.projector_sizes != model.spec.projector_sizes:
            raise ValueError(
                "config: vision_feature_layer must name as many states as when the model was "
                f"built, got {spec.feature_layers!r}"
            )
        model.set_spec(spec)
        model.language_model.config = spec.text
    remember_config(model)


def _parts(config: PretrainedConfig) -> dict[str, dict[str, Any]]:
    """The fields of a config and of its sub-configs."""
    own = vars(config)
    return {"": own} | {
        name: vars(value) for name, value in own.items() if isinstance(value, PretrainedConfig)
    }


def _is_fewer_layers(model: PreTrainedModel, part: str, name: str, value: Any) -> bool:
    """Whether a decoder should run its first layers only, as transformers' Llama and Gemma can."""
    if (
        name != "num_hidden_layers"
        or part == "vision_config"
        or model.spec.text is None
        or model.spec.text.cross_attention_layers
    ):
        return False
    return isinstance(value, int) and 0 < value <= len(model.language_model.layers)
