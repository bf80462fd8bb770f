"""SigLIP + Llama on disk: Hugging Face's LLaVA where the model has that shape, else our own
`siglip_llama`, with the same tensor names.
"""

from dataclasses import fields
from typing import Any

from transformers import LlamaConfig, LlavaConfig, PretrainedConfig, SiglipVisionConfig

from mllama.families import llava
from mllama.hf.configs import MllamaConfig
from mllama.weights.format import Format
from mllama.weights.rows import Rename


def written_as(config: PretrainedConfig) -> PretrainedConfig:
    """The config under which a model is written: LLaVA's in place of ours for a model that Hugging
    Face's LLaVA can be: features before the final norm, all of them merged, a projector of two
    layers as wide inside as the decoder, and a placeholder that has a row in the embedding matrix.
    """
    if not (
        isinstance(config, MllamaConfig)
        and config.vision_feature == "pre_norm"
        and (config.fusion, config.projector) == ("merge", "mlp")
        and config.projection_dim == config.text_config.hidden_size
        and config.image_token_index is not None
        and config.image_token_index < config.text_config.vocab_size
    ):
        return config
    same = (
        "ignore_index",
        "image_token_index",
        "multimodal_projector_bias",
        "projector_hidden_act",
        "tie_word_embeddings",
    )
    return LlavaConfig(
        vision_config=_fields(config.vision_config, SiglipVisionConfig),
        text_config=_fields(config.text_config, LlamaConfig),
        image_seq_length=config.text_config.num_image_tokens,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        **{name: getattr(config, name) for name in same},
    )


def _fields(config: PretrainedConfig, kind: type[PretrainedConfig]) -> dict[str, Any]:
    """What a config says in the fields of its parent class."""
    return {field.name: getattr(config, field.name) for field in fields(kind)} | {
        "model_type": kind.model_type
    }


def arguments_from_llava(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `MllamaConfig` from a LLaVA config.json.

    Raises:
        ValueError: a LLaVA that is no SigLIP + Llama, or reads other features than its tower's last
            layer.
    """
    for name, default, taken in (
        ("vision_feature_layer", -2, (-1, [-1])),
        ("vision_feature_select_strategy", "default", ("full",)),
    ):
        value = given.get(name, default)
        if value not in taken:
            raise ValueError(
                f"config.json: {name} = {value!r} is not MllamaConfig's; {taken[0]!r} is"
            )
    for name, default, taken in (
        ("vision_config", "clip_vision_model", "siglip_vision_model"),
        ("text_config", "llama", "llama"),
    ):
        part = given.get(name)
        kind = part.get("model_type", default) if isinstance(part, dict) else default
        if kind != taken:
            raise ValueError(
                f"config.json: a {name} of model_type {kind!r} is not MllamaConfig's; {taken!r} is"
            )
    same = (
        "vision_config",
        "text_config",
        "ignore_index",
        "multimodal_projector_bias",
        "projector_hidden_act",
        "tie_word_embeddings",
    )
    return {name: given[name] for name in same if name in given} | {
        "image_token_index": given.get("image_token_index", given.get("image_token_id", 32000)),
        "vision_feature": "pre_norm",
    }


def from_file(content: dict[str, Any]) -> MllamaConfig:
    """Raises ValueError for what cannot be."""
    return MllamaConfig(**content)


def to_file(config: MllamaConfig) -> dict[str, Any]:
    """The content of our own config.json."""
    return config.to_diff_dict() | {"architectures": ["MllamaForConditionalGeneration"]}


# What a LLaVA has not: a pooling. Cross-attention layers are named as the decoder's others.
TABLE = (*llava.TABLE, Rename("image_pooling.*", "image_pooling.*"))

FORMAT = Format(MllamaConfig, lambda config: TABLE, from_file, to_file)
