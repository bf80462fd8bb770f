"""Configs as dicts <-> transformers' config objects."""

import difflib
import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import CONFIG_MAPPING, PretrainedConfig

from mllama import families
from mllama.config.spec import ModelSpec
from mllama.weights.family import Config

LABELS_MAX = 2**16  # no part of the model has labels
REFUSALS = (StrictDataclassError, AttributeError, TypeError, KeyError, ArithmeticError)
"""What transformers' config classes raise for values that cannot be."""


def compose(config: PretrainedConfig) -> ModelSpec:
    """What a model of this config is made of.

    Raises:
        TypeError: no config.
        ValueError: a `model_type` that is no family of ours; sizes and choices that cannot be. The
            text names the field.
    """
    if not isinstance(config, PretrainedConfig):
        raise TypeError(
            f"config must be a config object of transformers or mllama, got {type(config).__name__}"
        )
    return families.compose(config.to_dict())


def config_object(config: Config) -> PretrainedConfig:
    """The config object of a complete config, which its family has checked.

    Raises:
        ValueError: a field that the class refuses; the text names it.
    """
    import mllama.hf.configs  # noqa: F401  # registers ours

    kind = CONFIG_MAPPING[config["model_type"]]
    for name in families.family_of(config).parts:
        _check_fields(name, config[name])
    _check_fields("config", config)
    return construct("config", kind, config)


def _check_fields(owner: str, config: Config) -> None:
    given = {name: value for name, value in config.items() if name != "model_type"}
    check_names(owner, CONFIG_MAPPING[config["model_type"]], given)
    check_common(owner, given)


def construct(owner: str, constructor: Any, given: Mapping[str, Any]) -> Any:
    """Run a config's constructor; the errors it has for values that cannot be become a
    ValueError.
    """
    try:
        return constructor(**given)
    except REFUSALS as error:
        raise ValueError(f"{owner}: {' '.join(str(error).split())}") from error


def file_content(config: PretrainedConfig) -> tuple[Config, PretrainedConfig]:
    """The content of a config.json, and the config that it is of: LLaVA's in place of ours where
    the model has that shape.
    """
    own = config.to_dict()
    written = families.written_as(own)
    family = families.family_of(written)
    if written is not own:
        config = config_object(family.from_json(written))
    return family.to_json(config.to_diff_dict()), config


def check_names(owner: str, kind: type, given: Iterable[str]) -> None:
    """Reject names that would shadow attributes of the class: its methods, its own tables, Python's
    own names.

    Raises:
        ValueError: names such a field.
    """
    taken = (
        {field.name for field in fields(kind)} if hasattr(kind, "__dataclass_fields__") else set()
    )
    for name in given:
        own = inspect.getattr_static(kind, name, None)
        if (
            name == "self"
            or name.startswith("__")
            or (own is not None and name not in taken and not isinstance(own, property))
        ):
            raise ValueError(f"{owner}: {name!r} is not the name of a field")


def check_common(owner: str, given: Mapping[str, Any]) -> None:
    """Check fields that every config has and transformers acts on before it looks: dtypes, kinds of
    layers, how many labels there are.

    Raises:
        ValueError: names the field.
    """
    for name in ("dtype", "torch_dtype"):
        value = given.get(name)
        if value is None or isinstance(value, torch.dtype):
            continue
        if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
            raise ValueError(f"{owner}: {name} must be the name of a torch dtype, got {value!r}")
    for name, kind in (("rope_parameters", dict), ("rope_scaling", dict), ("layer_types", list)):
        if not isinstance(given.get(name), (kind, type(None))):
            raise ValueError(
                f"{owner}: {name} must be a {kind.__name__} or None, got {given[name]!r}"
            )
    labels = given.get("num_labels", 0)  # transformers makes a dict with as many entries
    if not (isinstance(labels, int) and 0 <= labels <= LABELS_MAX):
        raise ValueError(
            f"{owner}: num_labels must be an integer of 0 to {LABELS_MAX}, got {labels!r}"
        )


def set_fields(config: PretrainedConfig, given: Mapping[str, Any]) -> None:
    """Set fields of a config as `from_pretrained` takes them; a dict changes what it names of a
    config within.

    Raises:
        TypeError: a field that the config has not.
        ValueError: a value that cannot be; the text names the field.
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
            near = difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(
                f"from_pretrained got an option it does not know, {name!r}, which is no field of "
                f"a {kind.__name__} either{hint}"
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
