"""The model families: one file each, all listed here."""

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
    for module in (gemma, gemma2, gemma3, llama, llava, mllama, paligemma, siglip, siglip_llama)
}
"""By `model_type`."""
MODEL_TYPES: dict[str, Family] = FAMILIES | {
    name: family for family in FAMILIES.values() for name in family.also
}
"""By every `model_type` that a config.json may have."""


def family_of(config: Config) -> Family:
    """The family of a config or of the content of a config.json, by its exact `model_type`.

    Raises:
        ValueError: the `model_type` is unknown.
    """
    kind: Any = config.get("model_type")
    if not isinstance(kind, str) or kind not in MODEL_TYPES:
        known = ", ".join(sorted(MODEL_TYPES))
        raise ValueError(f"config: model_type {kind!r} is not known; known are {known}")
    return MODEL_TYPES[kind]


def compose(config: Config) -> ModelSpec:
    """The spec of a model.

    Args:
        config: the content of a config.json, in any spelling; missing fields have the family's
            defaults.

    Raises:
        ValueError: the `model_type` is unknown, or sizes and choices are invalid. The message
            names the field.
    """
    return family_of(config).compose(config)


def written_as(config: Config) -> Config:
    """The config that is written for a model, which may be another family's."""
    return family_of(config).written_as(config)


def stock_prefixes(config: Config) -> tuple[tuple[str, str], ...]:
    """(ours, transformers') prefixes of module names in memory."""
    return family_of(written_as(config)).stock_prefixes
