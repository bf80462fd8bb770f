"""The families of models: one file each, listed here once."""

from typing import Any

from mllama.config.spec import ModelSpec
from mllama.families import (
    gemma,
    gemma2,
    gemma3,
    llama,
    llava,
    mllama,
    paligemma,
    siglip,
    siglip_llama,
)
from mllama.weights.family import Config, Family

FAMILIES: dict[str, Family] = {
    module.FAMILY.name: module.FAMILY
    for module in (*(gemma, gemma2, gemma3, llama, llava, mllama, paligemma, siglip, siglip_llama),)
}
"""By `model_type`."""
MODEL_TYPES: dict[str, Family] = FAMILIES | {
    name: family for family in FAMILIES.values() for name in family.also
}
"""Every `model_type` that a config.json may have, and its family."""


def family_of(config: Config) -> Family:
    """The family of a config or of the content of a config.json: its `model_type` decides, exactly.

    Raises:
        ValueError: a `model_type` that is not known.
    """
    kind: Any = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ValueError(f"config: model_type {kind!r} is not known; known are {known}")
    return MODEL_TYPES[kind]


def compose(config: Config) -> ModelSpec:
    """What a model is made of.

    Args:
        config: the content of a config.json, in any spelling; fields that it lacks have their
            family's defaults.

    Raises:
        ValueError: a `model_type` that is no family of ours; sizes and choices that cannot be. The
            text names the field.
    """
    return family_of(config).compose(config)


def written_as(config: Config) -> Config:
    """The config under which a model is written, which may be another family's."""
    return family_of(config).written_as(config)


def stock_prefixes(config: Config) -> tuple[tuple[str, str], ...]:
    """How modules' names begin here and in transformers' class of the model, in memory."""
    return family_of(written_as(config)).stock_prefixes
