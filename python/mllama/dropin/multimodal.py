"""SigLIP + Llama, PaliGemma and Gemma as older scripts call them: `kv_cache` in and out."""

import os
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import nn

import mllama
from mllama.dropin.config import MLLAMAConfig
from mllama.dropin.generate import from_older
from mllama.dropin.layers import made_in
from mllama.fusion.merge import find_placeholder
from mllama.fusion.projector import LinearProjector
from mllama.hf.config_objects import compose
from mllama.hf.loader import load_as
from mllama.hf.names import Cache, PretrainedConfig, PreTrainedTokenizerBase
from mllama.hf.outputs import MllamaOutput


class OlderOutput(MllamaOutput):
    """A MllamaOutput where every field is readable by name, None where it is absent, and the cache
    is also `kv_cache`.
    """

    @property
    def kv_cache(self) -> Cache | None:
        """The cache, where one was used."""
        return self.cache

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, str) and (key == "kv_cache" or key in self.__dataclass_fields__):
            return getattr(self, key)
        return super().__getitem__(key)

    def __contains__(self, key: object) -> bool:
        return super().__contains__("cache" if key == "kv_cache" else key)

    def get(self, key: str, default: Any = None) -> Any:
        """As a dict's."""
        return self[key] if key in self else default  # noqa: SIM401


class OlderModel(mllama.MllamaForConditionalGeneration):
    """A model of any family, called in the older order with the cache as `kv_cache`.

    `forward` is the package's own: transformers reads its signature.

    Attributes:
        vocab_size: the decoder's.
        config: both of its parts have `num_image_tokens`, the placeholders per image.
    """

    sees_prompt_both_ways = False
    _resizing = False

    def __init__(self, config: PretrainedConfig, reference: str = "meta"):
        if tokens := compose(config).tokens_per_image:
            config.vision_config.num_image_tokens = tokens
            config.get_text_config().num_image_tokens = tokens
        super().__init__(config, reference)
        self.vocab_size = self.spec.text.vocab_size

    def __call__(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        kv_cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> OlderOutput | tuple:
        """As `mllama.MllamaForConditionalGeneration`, whose other arguments go by name.

        Once `kv_cache`, also called `cache`, has tokens, images given again are ignored.

        Returns:
            `output["logits"]`, `["loss"]` (None without labels), `["kv_cache"]`, also as attributes

        Raises:
            ValueError: a cache under two names; else as the package's.
        """
        kwargs = _one_cache(kv_cache, kwargs)
        told = any(kwargs.get(name) is not None for name in ("token_type_ids", "prefix_length"))
        if self.sees_prompt_both_ways and input_ids is not None and labels is None and not told:
            kwargs["token_type_ids"] = torch.zeros_like(input_ids)
        if labels is not None and not isinstance(self.config, mllama.MllamaConfig):
            ignored = getattr(self.config, "ignore_index", -100)
            labels = labels.masked_fill(labels == ignored, -100)
        kwargs |= {"attention_mask": attention_mask, "labels": labels, "position_ids": position_ids}
        pixels = self._placed(pixel_values, input_ids, kwargs)
        output = super().__call__(input_ids=input_ids, pixel_values=pixels, **kwargs)
        if isinstance(output, MllamaOutput):
            return OlderOutput(**output)
        return output

    def generate(self, inputs=None, *args, kv_cache: Cache | None = None, **kwargs):
        """As transformers', with `kv_cache` as another name of `cache`."""
        kwargs = _one_cache(kv_cache, kwargs)
        if kwargs.get("pixel_values") is not None:
            ids = kwargs.get("input_ids", inputs)
            kwargs["pixel_values"] = self._placed(kwargs["pixel_values"], ids, kwargs)
        return super().generate(inputs, *args, **kwargs)

    def _placed(self, pixel_values, input_ids, kwargs) -> torch.Tensor | None:
        """The pixels, or None with a warning where the prompt has no place for them. Until the
        config has an `image_token_index`, the id that stands in runs of `num_image_tokens` is it.
        """
        merged = getattr(self.config, "fusion", None) == "merge"
        known = not merged or self.config.image_token_index is not None
        if known or pixel_values is None or input_ids is None:
            return pixel_values
        if kwargs.get("interpolate_pos_encoding"):  # another number of placeholders
            return pixel_values
        per_image, mask = self.spec.tokens_per_image, kwargs.get("attention_mask")
        mask = mask if mask is not None and mask.shape == input_ids.shape else None
        token = find_placeholder(input_ids, mask, per_image, len(pixel_values))
        if token is None and bool((input_ids < self.vocab_size).all()):
            warnings.warn(
                f"pixel_values are not used: no id of input_ids stands in runs of {per_image}, as "
                "MllamaImageProcessor writes <image>",
                stacklevel=3,
            )
            return None
        self.config.image_token_index = token  # None: the package rejects a lone <image>
        return pixel_values

    def tie_weights(self, *args: Any, **kwargs: Any) -> None:
        """Called without arguments, as scripts do: make the head the embedding matrix. Otherwise,
        and inside `resize_token_embeddings`: as the config says.
        """
        if not (args or kwargs or self._resizing):
            self.config.tie_word_embeddings = True
        super().tie_weights(*args, **kwargs)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """As transformers', which calls `tie_weights()` at the end."""
        self._resizing = True
        try:
            return super().resize_token_embeddings(*args, **kwargs)
        finally:
            self._resizing = False


def _one_cache(kv_cache: Cache | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    others = [kwargs.get(name) for name in ("cache", "past_key_values")]
    if kv_cache is not None and any(other is not None for other in others):
        raise ValueError("give one of kv_cache, cache and past_key_values")
    return kwargs if kv_cache is None else kwargs | {"cache": kv_cache, "past_key_values": None}


class MultiModalProjector(LinearProjector):
    """One linear layer, `linear`, from the encoder's width to the decoder's."""

    def __init__(self, config: MLLAMAConfig):
        super().__init__(config.vision_config.hidden_size, config.text_config.hidden_size)


class MllamaForConditionalGeneration(OlderModel):
    """SigLIP, one linear layer and Llama; also any other model of the package.

    Parameters have this package's names; `load_state_dict` also reads older ones.

    Args:
        config: `MLLAMAConfig`; weights are random, in `config.dtype`.
        reference: as of `mllama.MllamaForConditionalGeneration`.

    Raises:
        TypeError: no config. ValueError: a family, size or choice that cannot be.
    """

    def __init__(self, config: PretrainedConfig, reference: str = "meta"):
        with made_in(config.dtype if isinstance(config, MLLAMAConfig) else None):
            super().__init__(config, reference)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As the package's; also takes the names of older files. Warns where some do not fit."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        renamed = from_older(state_dict)
        report = super().load_state_dict(renamed, strict=strict, assign=assign)
        unknown = report.unexpected_keys
        if unknown or not renamed:
            fit = f"{len(renamed) - len(unknown)} of {len(renamed)} tensors fit"
            warnings.warn(f"load_state_dict: {fit}; not known: {unknown[:5]}", stacklevel=2)
        return report


class GemmaForCausalLM(OlderModel):
    """A Gemma of a `GemmaConfig`; the head is the embedding matrix."""


class PaliGemmaForConditionalGeneration(OlderModel):
    """A PaliGemma of a `PaliGemmaConfig`; a prompt without labels is seen both ways."""

    sees_prompt_both_ways = True


_CLASSES = {
    "gemma": GemmaForCausalLM,
    "paligemma": PaliGemmaForConditionalGeneration,
    "siglip_vision_model": mllama.SiglipModel,
    "siglip": mllama.SiglipModel,
}


def load_hf_model(
    model_path: str | os.PathLike, device: str | torch.device = "cpu", *, strict: bool
) -> tuple[Any, Any]:
    """`load_hf_model` of `utils`, which is strict, and of `Model.utils`, which prints a report of
    what does not fit, ties a missing head and initializes what else is missing.

    Returns:
        The model, in eval mode, and its tokenizer, which pads on the right.

    Raises:
        FileNotFoundError: no such model or no tokenizer.
        ValueError: broken files; with `strict`, tensors that do not fit, all in one error.
    """

    def class_of(config: PretrainedConfig) -> type:
        return _CLASSES.get(config.model_type, MllamaForConditionalGeneration)

    model, tokenizer = load_as(class_of, model_path, device, strict)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.padding_side = "right"
    return model, tokenizer


load_strictly = partial(load_hf_model, strict=True)
load_tolerantly = partial(load_hf_model, strict=False)
