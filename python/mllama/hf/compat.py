"""Differences between the supported releases of transformers. No other module depends on them.

transformers 5.24 renamed `past_key_values` to `cache`. This package uses `cache`; callers may use
either name with either release.
"""

from dataclasses import dataclass, fields
from typing import Any

import torch
from transformers import Cache, GenerationConfig, PretrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import ModelOutput

_OLD_NAME = "past_key_values"
# The keyword under which transformers' generate passes a cache.
CACHE_NAME = (
    "cache" if "cache" in {field.name for field in fields(BaseModelOutputWithPast)} else _OLD_NAME
)


def one_cache(cache: Cache | None, past_key_values: Cache | None) -> Cache | None:
    """The cache, given by either name.

    Raises:
        ValueError: it is given by both.
    """
    if cache is not None and past_key_values is not None:
        raise ValueError("cache and past_key_values are two names of one argument; give one")
    return past_key_values if cache is None else cache


def rename_cache(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Keywords of `generate` with the cache under `CACHE_NAME`, given by either name.

    Raises:
        ValueError: it is given by both.
    """
    if "cache" not in kwargs and _OLD_NAME not in kwargs:
        return kwargs
    rest = {name: value for name, value in kwargs.items() if name not in ("cache", _OLD_NAME)}
    return rest | {CACHE_NAME: one_cache(kwargs.get("cache"), kwargs.get(_OLD_NAME))}


def hand_on(inputs: dict[str, Any]) -> dict[str, Any]:
    """Arguments that a step of `generate` passes to forward, with the cache under the old name.
    PEFT inserts soft prompts in that step; it looks for this name in either release, and without it
    would insert them before every token.
    """
    return {_OLD_NAME if name == CACHE_NAME else name: value for name, value in inputs.items()}


def config_fields(config: PretrainedConfig) -> dict[str, Any]:
    """A config's fields. transformers 5.23 includes attributes that a model set on it."""
    content = config.to_dict()
    content.pop("keys_to_ignore_at_inference", None)
    return content


class NextTokenModel:
    """A model whose logits at t are scored against the label at t + 1, registered as such with
    transformers.

    Trainer's `label_smoothing_factor` shifts the labels of models whose class name is in
    transformers' list of causal models, so every subclass is added, including those made by
    wrappers (FSDP). The package's name distinguishes it from transformers' class of the same name.
    """

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[_named(cls)] = _named(cls)

    def _get_name(self) -> str:
        return _named(type(self))


def _named(cls: type) -> str:
    return f"mllama.{cls.__name__}"


class CacheOutput(ModelOutput):
    """A ModelOutput whose field `cache` can also be read and written as `past_key_values`, without
    a warning.
    """

    cache: Any  # the field of every subclass

    @property
    def past_key_values(self) -> Cache | None:
        """`cache`."""
        return self.cache

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_new_name(key))

    def __setitem__(self, key: str, value: Any) -> None:
        super().__setitem__(_new_name(key), value)

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__(_new_name(name), value)

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_new_name(key))

    def get(self, key: str, default: Any = None) -> Any:
        """As `dict.get`, by either name."""
        return super().get(_new_name(key), default)


def _new_name(key: Any) -> Any:
    return "cache" if isinstance(key, str) and key == _OLD_NAME else key


@dataclass
class DecoderOutput(CacheOutput):
    """Output of a decoder.

    Attributes:
        last_hidden_state: [B, T, hidden], after the final norm.
        cache: the key-value cache, if one was used; also read as `past_key_values`.
        hidden_states: layers + 1 of [B, T, hidden].
        attentions: one [B, heads, T, keys] float32 per layer.
    """

    last_hidden_state: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None


def mask_length(generation_config: GenerationConfig) -> int | None:
    """Length of an attention_mask of ones that `generate` left out; None where it left none out."""
    return getattr(generation_config, "_mask_length", None)
