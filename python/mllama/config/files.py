"""config.json <-> transformers' config classes: what a file may say, and the spelling that most
readers know.
"""

import difflib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PretrainedConfig

from mllama.config.checks import check_common, check_names, check_size

# Fields that decide what code runs, or how; and transformers' own `_` names, which it trusts.
_STEERING = ("auto_map", "trust_remote_code", "attn_implementation", "experts_implementation")

# What transformers' classes divide by, and what is laid out by the number.
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_global_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "attention_heads",
    "head_dim",
    "image_size",
    "patch_size",
    "vocab_size",
)


def harmless(content: Any) -> Any:
    """The content of a JSON file without fields that could steer what code runs, at any depth."""
    if isinstance(content, dict):
        return {
            name: harmless(value)
            for name, value in content.items()
            if not name.startswith("_") and name not in _STEERING
        }
    return [harmless(value) for value in content] if isinstance(content, list) else content


def build(
    config_class: type[PretrainedConfig],
    content: dict[str, Any],
    parts: Mapping[str, tuple[type[PretrainedConfig], ...]] | None = None,
) -> PretrainedConfig:
    """A config object from the content of a config.json.

    Args:
        config_class: what to build.
        content: of the file, harmless already.
        parts: the classes that a field with a config of its own may be of; the first where the file
            does not say.

    Raises:
        ValueError: a field that the class refuses, another kind of part, quantised weights; the
            text names the field.
    """
    content = dict(content)
    for name, classes in (parts or {}).items():
        part = content.get(name)
        if part is None:
            part = {}
        if not isinstance(part, dict):
            raise ValueError(f"{name} must be an object, got {part!r}")
        kinds = {kind.model_type: kind for kind in classes}
        found = part.get("model_type", classes[0].model_type)
        if not isinstance(found, str) or found not in kinds:
            raise ValueError(
                f"a {name} of model_type {found!r} is not supported; {', '.join(map(repr, kinds))} is"
            )
        _check(name, kinds[found], part)
        if part:
            content[name] = part | {"model_type": found}
    _check("config", config_class, content)
    try:
        return config_class(**content)
    except (StrictDataclassError, AttributeError, TypeError, KeyError, ArithmeticError) as error:
        raise ValueError(" ".join(str(error).split())) from error


def _check(owner: str, config_class: type[PretrainedConfig], content: dict[str, Any]) -> None:
    check_names(
        owner,
        config_class,
        {name: value for name, value in content.items() if name != "model_type"},
    )
    check_common(owner, content)
    if content.get("quantization_config") is not None:
        raise ValueError(
            f"{owner}: quantization_config: weights quantised by another library are not supported"
        )
    for name in _SIZES:
        if content.get(name) is not None:
            check_size(owner, name, content[name])


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
                f"from_pretrained got an option it does not know, {name!r}, which is no field of a {kind.__name__} either{hint}"
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


def content_of(config: PretrainedConfig, architecture: str) -> dict[str, Any]:
    """The content of a config.json in the older spelling, which every version of transformers, vLLM
    and other readers know: `rope_theta` and `rope_scaling` for `rope_parameters`. Without dtypes.

    Args:
        config: to write.
        architecture: Hugging Face's class of such models.
    """
    return _older(harmless(config.to_diff_dict())) | {
        "architectures": [architecture],
        "model_type": config.model_type,
    }


def _older(content: dict[str, Any]) -> dict[str, Any]:
    content = {
        name: _older(value) if isinstance(value, dict) and name.endswith("_config") else value
        for name, value in content.items()
    }
    content.pop("dtype", None)
    content.pop("keys_to_ignore_at_inference", None)  # a model's, said by its class
    rope = dict(content.pop("rope_parameters", None) or {})
    if "full_attention" in rope:  # one per kind of layer, which the older spelling has not
        content["rope_parameters"] = rope
    elif rope:
        rope.pop("type", None)
        content["rope_theta"] = rope.pop("rope_theta")
        content["rope_scaling"] = None if rope.get("rope_type", "default") == "default" else rope
    return content
