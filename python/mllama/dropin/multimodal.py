"""SigLIP + Llama, PaliGemma and Gemma as older scripts call them: `kv_cache` in and out."""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import mllama
from mllama.dropin.config import MLLAMAConfig, Unset
from mllama.dropin.generate import from_older
from mllama.dropin.layers import made_in
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

    def __init__(self, config: PretrainedConfig, reference: str = "meta"):
        _set_image_tokens(config)
        super().__init__(config, reference)
        self.vocab_size = self.config.get_text_config().vocab_size

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
        with self._image_token(input_ids, attention_mask, pixel_values, kwargs) as pixels:
            output = super().__call__(input_ids=input_ids, pixel_values=pixels, **kwargs)
        return OlderOutput(**output) if isinstance(output, MllamaOutput) else output

    def generate(self, inputs=None, *args, kv_cache: Cache | None = None, **kwargs):
        """As transformers', with `kv_cache` as another name of `cache`."""
        kwargs = _one_cache(kv_cache, kwargs)
        ids, pixels = kwargs.get("input_ids", inputs), kwargs.pop("pixel_values", None)
        with self._image_token(ids, kwargs.get("attention_mask"), pixels, kwargs) as pixels:
            if pixels is not None:
                kwargs["pixel_values"] = pixels
            return super().generate(inputs, *args, **kwargs)

    @contextmanager
    def _image_token(self, input_ids, attention_mask, pixels, kwargs) -> Iterator[Any]:
        """Yields the pixels; a subclass may find the placeholder's id meanwhile."""
        yield pixels

    @property
    def image_token_index(self) -> int | None:
        """The placeholder's id, of the config; may be set."""
        return self.config.image_token_index

    @image_token_index.setter
    def image_token_index(self, value: int) -> None:
        self.config.image_token_index = value

    _resizing = False

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


def _set_image_tokens(config: PretrainedConfig) -> None:
    """Write `num_image_tokens`, the placeholders per image, into both parts of a config."""
    vision = getattr(config, "vision_config", None)
    if vision is None or not hasattr(vision, "patch_size") or config.model_type == "mllama":
        return
    text = config.get_text_config()
    tokens = (vision.image_size // vision.patch_size) ** 2
    if isinstance(config, mllama.MllamaConfig):
        tokens = text.num_image_tokens
    elif config.model_type == "llava":
        tokens += vision.model_type == "clip_vision_model"
        tokens -= config.vision_feature_select_strategy == "default"
    vision.num_image_tokens = text.num_image_tokens = tokens


def _one_cache(kv_cache: Cache | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    others = [kwargs.get(name) for name in ("cache", "past_key_values")]
    if kv_cache is not None and any(other is not None for other in others):
        raise ValueError("give one of kv_cache, cache and past_key_values")
    return kwargs if kv_cache is None else kwargs | {"cache": kv_cache, "past_key_values": None}


class MultiModalProjector(nn.Module):
    """One linear layer, `linear`, from the encoder's width to the decoder's."""

    def __init__(self, config: MLLAMAConfig):
        super().__init__()
        self.linear = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[..., encoder width] -> [..., decoder width]."""
        return self.linear(features)


class _VisionModel(nn.Module):
    """A model's encoder as scripts call it; its parameters are the model's."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.vision_model = encoder

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[images, channels, S, S] -> [images, patches, hidden]."""
        return self.vision_model(pixel_values).last_hidden_state


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
        device = torch.get_default_device()
        if not isinstance(config, MLLAMAConfig) or device.type == "meta":
            super().__init__(config, reference)
        else:  # on meta first: billions of random numbers are drawn once
            with torch.device("meta"), made_in(config.dtype):
                super().__init__(config, reference)
            self.to_empty(device=device)
            self.init_weights()

    @property
    def vision_model(self) -> _VisionModel:
        """The encoder, which returns bare features."""
        return _VisionModel(self.vision_tower)

    def load_state_dict(self, state_dict, strict: bool = True, assign: bool = False):
        """As the package's; also takes the names of older files. Warns where few of them fit."""
        if not isinstance(state_dict, Mapping):
            raise TypeError(f"state_dict must be a dict, got {type(state_dict).__name__}")
        renamed = from_older(state_dict)
        report = super().load_state_dict(renamed, strict=strict, assign=assign)
        unknown = len(report.unexpected_keys)
        if 2 * unknown > len(renamed) or not renamed:
            fit = f"{len(renamed) - unknown} of {len(renamed)} tensors fit"
            names = ", ".join(sorted(report.unexpected_keys)[:5])
            warnings.warn(f"load_state_dict: {fit}; not known: {names or 'none'}", stacklevel=2)
        return report

    @contextmanager
    def _image_token(self, input_ids, attention_mask, pixels, kwargs) -> Iterator[Any]:
        """While inside, the config has the placeholder's id, if no script said it: it is the one
        that stands in runs of `num_image_tokens`. Yields the pixels, None where no id does.
        """
        told, cache = getattr(self.config, "image_token_index", None), kwargs.get("cache")
        if cache is None:
            cache = kwargs.get("past_key_values")
        filled = cache is not None and int(cache.get_seq_length()) > 0
        features = kwargs.get("image_features")
        images = features if pixels is None else pixels
        unset = isinstance(told, Unset) and input_ids is not None and images is not None
        if not unset or filled or kwargs.get("interpolate_pos_encoding"):
            yield pixels
            return
        ids = input_ids[:, : kwargs.get("prompt_length")]
        mask = None if attention_mask is None else attention_mask[:, : ids.shape[1]]
        token = self._find_image_token(ids, mask, len(images))
        if token is None:
            kwargs.pop("image_features", None)
            yield None
            return
        spec = self.spec
        self.config.image_token_index = token
        self.set_spec(replace(spec, image_token_index=token))  # an Unset may equal the id
        try:
            yield pixels
        finally:
            self.config.image_token_index = told
            self.set_spec(spec)

    def _find_image_token(self, ids, mask, images: int) -> int | None:
        """The id all of whose runs are multiples of `num_image_tokens`. Of several, one that no
        text has goes first, then one that stands there often enough for the images.
        """
        per_image = self.config.get_text_config().num_image_tokens
        ids = ids if mask is None else ids.masked_fill(mask == 0, -1)
        rows = nn.functional.pad(ids, (0, 1), value=-1)  # so that no run crosses rows
        values, lengths = torch.unique_consecutive(rows.flatten(), return_counts=True)
        runs: dict[int, list[int]] = {}
        for value, length in zip(values.tolist(), lengths.tolist(), strict=True):
            runs.setdefault(value, []).append(length)
        del runs[-1]
        text = {value: value < self.vocab_size and value != 128256 for value in runs}
        fitting = [value for value in runs if not any(n % per_image for n in runs[value])]
        if fitting:
            return min(fitting, key=lambda v: (text[v], sum(runs[v]) != images * per_image))
        if stray := [value for value in runs if not text[value]]:
            raise ValueError(
                f"input_ids hold {stray}, but not in runs of {per_image} for {images} images: "
                f"expand each <image> with MllamaImageProcessor(tokenizer, {per_image}, image_size)"
            )
        warnings.warn(
            f"pixel_values are not used: no id of input_ids stands in runs of {per_image}, as "
            "MllamaImageProcessor writes <image>",
            stacklevel=5,
        )
        return None

    def _merge_input_ids_with_image_features(
        self, image_features, inputs_embeds, input_ids, attention_mask=None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write features [images, patches, hidden] over the embeddings [B, T, hidden] of the
        placeholders in input_ids [B, T].

        Returns:
            [B, T, hidden] and the mask [B, T], ones where there was none: new tensors.
        """
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask.clone()
        places = self._placeholders_of(input_ids, attention_mask, len(image_features))
        found, wanted = int(places.sum()), image_features.shape[:2].numel()
        if found not in (0, wanted) or image_features.shape[2] != inputs_embeds.shape[2]:
            shape = list(image_features.shape)
            raise ValueError(f"image_features {shape} do not fit {found} placeholders")
        if not found:
            return inputs_embeds.clone(), mask
        features = image_features.to(inputs_embeds)
        return inputs_embeds.masked_scatter(places.unsqueeze(-1), features), mask

    def _placeholders_of(self, input_ids, attention_mask, images: int) -> torch.Tensor:
        """bool [B, T]."""
        token = self.config.image_token_index
        if isinstance(token, Unset):
            token = self._find_image_token(input_ids, attention_mask, images)
        return (
            torch.zeros_like(input_ids, dtype=torch.bool) if token is None else input_ids == token
        )

    def _compute_loss_with_masking(self, logits, labels, input_ids) -> torch.Tensor:
        """Mean loss of logits [B, T, vocabulary] against the next label of [B, T], without labels
        of `ignore_index` and placeholders in input_ids [B, T], one image to a row.
        """
        places = self._placeholders_of(input_ids, None, len(input_ids))
        labels = labels.masked_fill(places, self.config.ignore_index)[:, 1:].flatten()
        scores = logits[:, :-1].flatten(0, 1).float()  # (B, T - 1, V) -> (B * (T - 1), V)
        return cross_entropy(scores, labels, ignore_index=self.config.ignore_index)

    def _create_conversation_mask(self, input_ids: torch.Tensor, tokenizer: Any) -> torch.Tensor:
        """bool [B, T]: what the assistant says in a chat of Llama 3's form, from after its header
        and a blank line to `<|eot_id|>` (included), the next header, the padding or the end.

        Raises:
            ValueError: the tokenizer has no such tokens.
        """
        metas = isinstance(tokenizer, mllama.Tokenizer)
        known = tokenizer.special if metas else tokenizer.get_vocab()
        names = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
        if missing := [name for name in names if name not in known]:
            raise ValueError(f"tokenizer has no {missing[0]}, which Llama 3's chats have")
        start, end, turn = (known[name] for name in names)
        options = {} if metas else {"add_special_tokens": False}
        header = [start, *tokenizer.encode("assistant", **options), end]
        blank = list(tokenizer.encode("\n\n", **options))
        stops = {start, tokenizer.pad_id if metas else tokenizer.pad_token_id} - {turn}
        rows = []
        for row in input_ids.tolist():
            said, begin = [], len(row)  # where the assistant begins to speak
            for place, token in enumerate(row, start=1):
                begin = len(row) if token in stops else begin
                said.append(place > begin)
                if token == turn:
                    begin = len(row)
                elif row[:place][-len(header) :] == header:
                    begin = place + len(blank) * (row[place : place + len(blank)] == blank)
            rows.append(said)
        return torch.tensor(rows, dtype=torch.bool, device=input_ids.device).reshape(
            input_ids.shape
        )


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


def _load(model_path, device, strict: bool) -> tuple[Any, Any]:
    def class_of(config: PretrainedConfig) -> type:
        return _CLASSES.get(config.model_type, MllamaForConditionalGeneration)

    model, tokenizer = load_as(class_of, model_path, device, strict)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.padding_side = "right"
    return model, tokenizer


def load_strictly(model_path: str | os.PathLike, device: str | torch.device = "cpu"):
    """`utils.load_hf_model`: (model in eval mode, tokenizer that pads on the right).

    Raises:
        FileNotFoundError: no such model or no tokenizer.
        ValueError: broken files, or tensors that do not fit, all in one error.
    """
    return _load(model_path, device, strict=True)


def load_tolerantly(model_path: str | os.PathLike, device: str | torch.device = "cpu"):
    """`Model.utils.load_hf_model`: as the strict one, but prints a report of what does not fit,
    ties a missing head and initializes what else is missing.
    """
    return _load(model_path, device, strict=False)
