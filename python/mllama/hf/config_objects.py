"""Configs as dicts <-> transformers' config objects."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from mllama import families
from mllama.config.spec import ModelSpec
from mllama.hf import configs as _ours  # noqa: F401  # registers our config class
from mllama.hf.arguments import nearest
from mllama.hf.config_checks import check_common, check_names, construct
from mllama.weights.family import Config


def compose(config: PretrainedConfig) -> ModelSpec:
    """The spec for a config object.

    Raises:
        TypeError: config is not a config object.
        ValueError: the `model_type` is unknown, or sizes and choices are invalid; the message
            names the field.
    """
    if not isinstance(config, PretrainedConfig):
        raise TypeError(
            f"config must be a config object of transformers or mllama, got {type(config).__name__}"
        )
    return families.compose(config.to_dict())


def config_object(config: Config) -> PretrainedConfig:
    """The config object for a complete config that its family has checked.

    Raises:
        ValueError: the class rejects a field; the message names it.
    """
    kind = CONFIG_MAPPING[config["model_type"]]
    for name in families.family_of(config).parts:
        _check_fields(name, config[name])
    _check_fields("config", config)
    return construct("config", kind, config)


def _check_fields(owner: str, config: Config) -> None:
    given = {name: value for name, value in config.items() if name != "model_type"}
    check_names(owner, CONFIG_MAPPING[config["model_type"]], given)
    check_common(owner, given)


def file_content(config: PretrainedConfig) -> tuple[Config, PretrainedConfig]:
    """The content of a config.json, and the config it belongs to: LLaVA's instead of ours if the
    model has that form.
    """
    own = config.to_dict()
    written = families.written_as(own)
    family = families.family_of(written)
    if written is not own:
        config = config_object(family.from_json(written))
    return family.to_json(config.to_diff_dict()), config


def set_fields(config: PretrainedConfig, given: Mapping[str, Any]) -> None:
    """Set config fields as `from_pretrained` does; a dict updates fields of a sub-config.

    Raises:
        TypeError: the config has no such field.
        ValueError: a value is invalid; the message names the field.
    """
    kind = type(config)
    settable = {name for name in dir(kind) if getattr(getattr(kind, name), "fset", None)}
    known = (
        {field.name for field in fields(kind)}
        | vars(config).keys()
        | kind.attribute_map.keys()
        | settable
    )
    known = sorted(name for name in known if not name.startswith("_"))
    for name, value in given.items():
        if name not in known:
            raise TypeError(
                f"from_pretrained got an unknown option {name!r}, which is not a field of "
                f"{kind.__name__} either{nearest(name, known)}"
            )
        part = getattr(config, name)
        if isinstance(part, PretrainedConfig) and isinstance(value, dict):
            set_fields(part, value)
            continue
        try:
            check_common(kind.__name__, {name: value})
            setattr(config, name, value)
        except (StrictDataclassError, TypeError) as error:
            raise ValueError(f"{kind.__name__}: {name}: {' '.join(str(error).split())}") from error
        if name == "tie_word_embeddings" and getattr(config, "text_config", None) is not None:
            config.text_config.tie_word_embeddings = value
