"""Support for images and masks in transformers' `generate`."""

import functools
import logging
import weakref
from typing import Any, Literal, overload

import torch
from transformers import GenerationMixin
from transformers.generation.candidate_generator import PromptLookupCandidateGenerator
from transformers.generation.utils import GenerateOutput

from mllama.hf.arguments import check_special, taken_by
from mllama.hf.built import check_built
from mllama.hf.cache import (
    TransformersCache,
    check_cache,
    keep_all_tokens,
    num_prefix_tokens,
    rewinding,
)
from mllama.hf.call import one_of_images
from mllama.hf.compat import CACHE_NAME, hand_on, mask_length, rename_cache
from mllama.hf.sampling import find_loop_obstacle, sample
from mllama.quant.packer import packing_of
from mllama.text.prefix import count_prefix

_log = logging.getLogger(__name__)

_READING = ("vision_feature_layer", "vision_feature_select_strategy", "interpolate_pos_encoding")
_TOKENIZERS = (
    "tokenizer",
    "assistant_tokenizer",
)  # for stop strings and token healing; transformers leaves them among the model's arguments


class MllamaGenerationMixin(GenerationMixin):
    """GenerationMixin for a model with images: they are encoded once, and their features are
    repeated and reordered with their rows.
    """

    spec: Any  # this and the following are the model's
    fusion: Any
    config: Any
    lm_head: Any
    device: Any
    read_again: Any

    @overload
    def generate(
        self, *args: Any, return_dict_in_generate: Literal[True], **kwargs: Any
    ) -> GenerateOutput: ...
    @overload
    def generate(self, *args: Any, **kwargs: Any) -> torch.LongTensor: ...
    def generate(self, *args: Any, **kwargs: Any) -> GenerateOutput | torch.LongTensor:
        """As GenerationMixin's; the cache may be given as `cache` or `past_key_values`.

        Raises:
            ValueError: attention_mask is not [B, T] (a 4-D mask does not cover generated tokens);
                else as GenerationMixin's.
        """
        check_built(self)  # type: ignore[arg-type]  # a mixin of that class
        mask = kwargs.get("attention_mask")
        if isinstance(mask, torch.Tensor) and mask.dim() != 2:
            raise ValueError(
                "attention_mask of generate must be [batch, tokens], zero where padded; "
                f"got {list(mask.shape)}"
            )
        kwargs = rename_cache(kwargs)
        if (
            encoded := kwargs.pop("mm_encoder_outputs", None)
        ) is not None:  # as features, which are repeated with their rows
            check_special(self, mm_encoder_outputs=encoded)
            kwargs["image_features"] = one_of_images(
                kwargs.get("pixel_values"), kwargs.get("image_features"), encoded, None
            )
        if torch.get_default_device().type in ("cpu", self.device.type):
            return super().generate(*args, **kwargs)
        with self.device:  # GenerationMixin creates tensors on torch's default device
            return super().generate(*args, **kwargs)

    def _supports_mm_encoder_outputs(self) -> bool:
        """False: images are encoded in the first step, not by GenerationMixin before it."""
        return False

    @staticmethod
    def create_masks_for_generate(
        attention_mask: torch.Tensor | None = None, **kwargs
    ) -> torch.Tensor | None:
        """The unchanged 2-D mask: the attention operator takes no [T, S] masks, also for static
        caches.
        """
        return attention_mask

    def prepare_inputs_for_generation(
        self, input_ids, inputs_embeds=None, is_first_iteration=False, **kwargs
    ) -> dict[str, Any]:
        """As GenerationMixin's. With a cache, image features and pixels are passed in the first
        step only.

        A step with an empty cache is a first step regardless of the argument: assisted decoding
        starts its assistant with one. Its own first step names no length, and would compute again
        what a given cache has.
        """
        kwargs = rename_cache(
            {name: value for name, value in kwargs.items() if name not in _TOKENIZERS}
        )
        cache = kwargs.get(CACHE_NAME)
        cached = 0 if cache is None else int(cache.get_seq_length())
        if is_first_iteration and cached > 0:
            new, mask = kwargs.get("next_sequence_length"), kwargs.get("attention_mask")
            whole = mask is not None and mask.shape[1] == input_ids.shape[1]
            if new is None and inputs_embeds is None and whole:
                new = input_ids.shape[1] - cached
            if new is not None:  # visual tokens are in the cache's length, but not among the ids
                kwargs["next_sequence_length"] = new + num_prefix_tokens(cache)
        is_first_iteration = is_first_iteration or (cache is not None and not cached)
        inputs = super().prepare_inputs_for_generation(
            input_ids, inputs_embeds=inputs_embeds, is_first_iteration=is_first_iteration, **kwargs
        )
        if not is_first_iteration and kwargs.get("use_cache", True):
            inputs.pop("image_features", None)
        mask, ids = inputs.get("cross_attention_mask"), inputs.get("input_ids")
        if cache is not None and cached and mask is not None and ids is not None:
            # As many rows as candidates of an assistant would else be taken for theirs.
            past = int(TransformersCache(cache, self.spec.text).length)
            rows = torch.arange(past, past + ids.shape[1], device=mask.device)
            inputs["cross_attention_mask"] = mask[:, rows.clamp(max=mask.shape[1] - 1)]
        return hand_on(inputs)

    def _prefill(self, input_ids, generation_config, model_kwargs, is_first_iteration=True):
        """As GenerationMixin's. Chunked prefill is also rejected for image_features, bidirectional
        prompts and prepended visual tokens. Without a cache, later steps get the prompt's length,
        because a generated placeholder id is text.
        """
        self.read_again()
        if (
            self.spec.encoder is not None
            and not model_kwargs.get("use_cache", True)
            and model_kwargs.get("inputs_embeds") is None
        ):
            model_kwargs.setdefault("prompt_length", input_ids.shape[1])
        if generation_config.prefill_chunk_size is not None:
            images = model_kwargs.get("image_features") is not None
            obstacles = {
                "a prompt with images": images
                and input_ids.shape[1] > generation_config.prefill_chunk_size,
                "a bidirectional prompt": model_kwargs.get("prefix_length") is not None,
                self.fusion.chunk_obstacle: self.fusion.chunk_obstacle is not None,
            }
            if obstacle := next((name for name, there in obstacles.items() if there), None):
                raise ValueError(
                    f"prefill_chunk_size must be None for {obstacle}: the prompt is prefilled whole"
                )
        return super()._prefill(input_ids, generation_config, model_kwargs, is_first_iteration)

    def _update_model_kwargs_for_generation(
        self, outputs, model_kwargs, is_encoder_decoder=False, num_new_tokens=1
    ) -> dict[str, Any]:
        """As GenerationMixin's; generated tokens attend to the images of the last token."""
        mask = model_kwargs.get("cross_attention_mask")
        model_kwargs = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if mask is not None:
            model_kwargs["cross_attention_mask"] = torch.cat(
                [mask, mask[:, -1:].expand(-1, num_new_tokens, -1, -1)], dim=1
            )
        return model_kwargs

    def _expand_inputs_for_generation(
        self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs
    ):
        """Repeat every row `expand_size` times (beams, several answers). Images are encoded once
        and repeated with their rows.

        Token types are replaced by the length of the bidirectional prefix, by default all of the
        prompt: transformers would extend them by the last type, so that an assistant's tokens
        would count as prompt.
        """
        types, cache = model_kwargs.pop("token_type_ids", None), model_kwargs.get(CACHE_NAME)
        check_cache(cache)
        given = model_kwargs.get("prefix_length") is not None
        if (
            self.spec.bidirectional_prefix
            and not given
            and not self._has_soft_prompts()
            and (cache is None or int(cache.get_seq_length()) == 0)
        ):
            prompt = (
                input_ids
                if model_kwargs.get("inputs_embeds") is None
                else model_kwargs["inputs_embeds"][..., 0]
            )
            types = torch.zeros_like(prompt, dtype=torch.long) if types is None else types
            model_kwargs["prefix_length"] = count_prefix(
                types, model_kwargs.get("attention_mask"), prompt.shape
            )
        pixel_values, features = (
            model_kwargs.pop("pixel_values", None),
            model_kwargs.pop("image_features", None),
        )
        if expand_size > 1 and features is None and pixel_values is not None:
            aspects = {
                name: model_kwargs[name]
                for name in ("aspect_ratio_ids", "aspect_ratio_mask")
                if name in model_kwargs
            }
            how = {name: model_kwargs.pop(name) for name in _READING if name in model_kwargs}
            features, pixel_values = self.get_image_features(pixel_values, **aspects, **how), None
        if expand_size > 1 and features is not None:
            per_row = self.fusion.images_per_row(
                input_ids,
                model_kwargs.get("inputs_embeds"),
                model_kwargs.get("attention_mask"),
                features,
                self.get_input_embeddings(),
            )
            features = torch.cat(
                [rows.repeat(expand_size, 1, 1) for rows in features.split(per_row)]
            )
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids, **model_kwargs
        )
        return input_ids, model_kwargs | {"pixel_values": pixel_values, "image_features": features}

    def _has_soft_prompts(self) -> bool:
        """Whether PEFT's `generate` called this one, to prepend learned embeddings. They make the
        prompt causal, as in training.
        """
        caller = getattr(self.prepare_inputs_for_generation, "__self__", self)
        return bool(
            getattr(getattr(caller, "active_peft_config", None), "is_prompt_learning", False)
        )

    def _prepare_cache_for_generation(
        self, generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
    ):
        """As GenerationMixin's; a static cache also gets room for prepended visual tokens, which
        its length does not include, and its layers with a window keep all tokens.
        """
        beams, answers = generation_config.num_beams, generation_config.num_return_sequences
        max_cache_length += self.fusion.extra_cache_tokens(
            _count_images(model_kwargs), batch_size * max(beams, answers)
        )
        given = model_kwargs.get(CACHE_NAME)
        super()._prepare_cache_for_generation(
            generation_config, model_kwargs, generation_mode, batch_size, max_cache_length
        )
        # A static cache whose layers all have a window does not say its size afterwards.
        if given is None and (cache := model_kwargs.get(CACHE_NAME)) is not None:
            keep_all_tokens(cache, self.spec.text.layers, max_cache_length)

    @functools.wraps(GenerationMixin._get_candidate_generator)
    def _get_candidate_generator(self, generation_config, input_ids, *args, **kwargs):
        """As GenerationMixin's. Candidates end before an image placeholder or an id without
        logits. Arguments that an assistant does not take are removed, such as images for a text
        model.
        """
        given, assistant = kwargs["model_kwargs"], kwargs.get("assistant_model")
        if assistant is not None:
            kwargs["model_kwargs"] = taken_by(assistant, given)
        generator = super()._get_candidate_generator(generation_config, input_ids, *args, **kwargs)
        # Weakly: the generator keeps what follows, and that this model.
        propose = weakref.WeakMethod(generator.get_candidates)
        stops = self._placeholder_ids(input_ids, given)
        blind = (
            isinstance(generator, PromptLookupCandidateGenerator)
            or kwargs["model_kwargs"].keys() != given.keys()
        )

        def get_candidates(
            input_ids: torch.Tensor, *args, **kwargs
        ) -> tuple[torch.Tensor, torch.Tensor | None]:
            no_text = torch.isin(input_ids, stops) | (input_ids >= self.lm_head.out_features)
            # A lookup uses its candidates as indices of logits.
            proposed, logits = propose()(  # who calls this keeps it
                input_ids.masked_fill(no_text, 0) if blind else input_ids, *args, **kwargs
            )
            new = proposed[:, input_ids.shape[1] :].to(input_ids.device)
            bad = (
                (torch.isin(new, stops) | (new >= self.lm_head.out_features))[0]
                .nonzero()
                .flatten()
                .tolist()
            )
            num_valid = bad[0] if bad else new.shape[1]
            return torch.cat([input_ids, new[:, :num_valid]], 1), logits[
                :, :num_valid
            ] if num_valid and logits is not None else None

        generator.get_candidates = get_candidates
        return generator

    def _placeholder_ids(
        self, input_ids: torch.Tensor, model_kwargs: dict[str, Any]
    ) -> torch.Tensor:
        """The ids of image placeholders in a prompt."""
        if (token := self.spec.image_token_index) is not None:
            return torch.tensor([token], device=input_ids.device)
        images, mask = _count_images(model_kwargs), model_kwargs.get("attention_mask")
        return input_ids[self.fusion.find_placeholders(input_ids, mask, images)].unique()

    @functools.wraps(GenerationMixin._sample)
    def _sample(
        self,
        input_ids,
        logits_processor,
        stopping_criteria,
        generation_config,
        synced_gpus=False,
        streamer=None,
        **model_kwargs,
    ):
        """As GenerationMixin's. A packed model selects tokens by `select_token`, whose draws with a
        seed are others than torch.multinomial's.
        """
        given = (input_ids, logits_processor, stopping_criteria, generation_config)
        if packing_of(self) is not None:
            obstacle = find_loop_obstacle(self, generation_config, synced_gpus)
            if obstacle is None:
                return sample(self, *given, streamer, model_kwargs)
            _log.debug("tokens are selected by transformers, not by select_token: %s", obstacle)
        return super()._sample(*given, synced_gpus, streamer, **model_kwargs)

    @functools.wraps(GenerationMixin._assisted_decoding)
    def _assisted_decoding(self, input_ids, *args, **kwargs):
        """As GenerationMixin's, which removes rejected candidates from the cache by the length of
        the ids: a cache with tokens needs the ids of all of them.
        """
        images, mask = _count_images(kwargs), kwargs.get("attention_mask")
        cache = kwargs.get(CACHE_NAME)
        if num_prefix_tokens(cache) or self.fusion.stands_before_text(input_ids, mask, images):
            raise ValueError(
                "assisted decoding and prompt lookup need input_ids that hold a placeholder for "
                "every visual token: set config.image_token_index, and let the processor "
                "(MllamaImageProcessor) write them"
            )
        if cache is not None and int(cache.get_seq_length()):
            length = mask_length(kwargs["generation_config"]) if mask is None else mask.shape[1]
            if input_ids.shape[1] != length:
                raise ValueError(
                    "assisted decoding and prompt lookup need input_ids of the whole text, what is "
                    f"in the cache too: {length} tokens, got {input_ids.shape[1]}"
                )
            # `prepare_inputs_for_generation` sees by a mask that they are whole.
            kwargs["attention_mask"] = torch.ones_like(input_ids) if mask is None else mask
        with rewinding(cache):
            return super()._assisted_decoding(input_ids, *args, **kwargs)


def _count_images(model_kwargs: dict[str, Any]) -> int:
    return next(
        (
            len(given)
            for name in ("pixel_values", "image_features")
            if (given := model_kwargs.get(name)) is not None
        ),
        0,
    )
