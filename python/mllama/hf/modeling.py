"""The core model as a transformers model: `forward` with its arguments, `generate`, saving."""

from typing import Any

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Cache, PretrainedConfig, PreTrainedModel
from transformers.utils.generic import ModelOutput

from mllama.config.checks import check_size
from mllama.config.features import FeatureChoice, choose_features
from mllama.fusion.base import ModelInputs
from mllama.hf.arguments import check_keywords, check_special
from mllama.hf.backbone import Backbone, backbone_of
from mllama.hf.built import check_built, remember_config
from mllama.hf.call import (
    PackedRows,
    by_rows,
    one_of_images,
    set_cache_and_positions,
    set_extra_outputs,
)
from mllama.hf.compat import DecoderOutput, NextTokenModel, one_cache
from mllama.hf.config_objects import compose
from mllama.hf.configs import MllamaConfig
from mllama.hf.generation import MllamaGenerationMixin
from mllama.hf.outputs import MllamaOutput, as_output
from mllama.hf.pretrained import PretrainedMixin, own_config
from mllama.model.model import VisionLanguageModel
from mllama.nn.norm import RMSNorm
from mllama.text.checks import check_text


class MllamaForConditionalGeneration(
    NextTokenModel, PretrainedMixin, MllamaGenerationMixin, VisionLanguageModel, PreTrainedModel
):
    """A vision-language or text model: encoder, projector, fusion and decoder of the config's
    family.

    Args:
        config: `mllama.MllamaConfig` for a SigLIP encoder and a Llama decoder joined in one of
            three ways; or transformers' own LlavaConfig, PaliGemmaConfig, MllamaConfig
            (Llama-3.2-Vision), LlamaConfig, GemmaConfig, Gemma2Config, Gemma3TextConfig. Weights
            are random; `from_pretrained` loads a folder.
        reference: which Llama-3.2-Vision to follow where the two differ, "meta" (as trained) or
            "hf" (as transformers computes it). The encoder's intermediate features are the inputs
            ("meta") or the outputs ("hf") of the listed layers; text before the first image attends
            to no image ("meta") or to all ("hf"), also to those that other rows of a batch have
            beyond the row's own. Can be set later; other families ignore it.

    Raises:
        TypeError: config is not a config object.
        ValueError: a family, size, choice or reference is invalid.
    """

    config_class = MllamaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    # As in transformers' own models.
    input_modalities = ("image", "text")  # type: ignore[assignment]
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    load_options = frozenset({"reference"})
    _no_split_modules = [
        "SiglipEncoderLayer",
        "TiledEncoderLayer",
        "DecoderLayer",
        "CrossAttentionDecoderLayer",
    ]
    _skip_keys_device_placement = ["cache", "past_key_values"]
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}

    def __init__(self, config: PretrainedConfig, reference: str = "meta"):
        spec = compose(config)
        if spec.text is None:
            raise ValueError(f"a {config.model_type} has no decoder: use SiglipModel")
        PreTrainedModel.__init__(self, own_config(config))
        self.build(spec, reference)
        if spec.text.extra_embeddings:  # the embedding has more rows than the head
            self._tied_weights_keys = None  # type: ignore[assignment]
        self.post_init()
        remember_config(self)

    @property
    def model(self) -> Backbone:
        """The model without its head, also `base_model`. It is called like the model and returns
        last_hidden_state.
        """
        return backbone_of(self, MllamaForConditionalGeneration.forward)

    def __setattr__(self, name: str, value: Any) -> None:
        """As torch's.

        Raises:
            AttributeError: `model` or `base_model` would be another module, which no call would
                run.
        """
        if name not in ("model", "base_model"):
            super().__setattr__(name, value)
        elif value is not self.model:
            raise AttributeError(
                f"{name} is a view of this model and cannot be replaced: replace its parts, such "
                "as language_model, or compile the model by its own compile()"
            )

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RMSNorm) and module.offset:
            nn.init.constant_(module.weight, 1 - module.offset)

    def get_input_embeddings(self) -> nn.Embedding:
        """The decoder's embedding."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        """Replace the decoder's embedding."""
        self.language_model.embed_tokens = value

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """Resize the vocabulary to `new_num_tokens`, as in transformers. Rows of the embedding
        matrix beyond the vocabulary (Llama-3.2-Vision: 8, including the placeholder's) stay beyond
        the new one, and every existing row keeps its id.

        Raises:
            ValueError: the size is invalid, or excludes the placeholder's row.
        """
        if new_num_tokens is None and pad_to_multiple_of is None:
            return self.get_input_embeddings()
        rows = self.spec.text.vocab_size if new_num_tokens is None else new_num_tokens
        check_size("resize_token_embeddings", "new_num_tokens", rows)
        if pad_to_multiple_of is not None:
            check_size("resize_token_embeddings", "pad_to_multiple_of", pad_to_multiple_of)
            rows += -rows % pad_to_multiple_of
        extra, token = (
            self.spec.text.extra_embeddings,
            getattr(self.config, "image_token_index", None),
        )
        if extra and token is not None and rows + extra <= token:
            raise ValueError(
                f"new_num_tokens must be at least {token + 1 - extra}, for the placeholder {token} "
                f"to keep its row; got {rows}"
            )
        super().resize_token_embeddings(rows, None, mean_resizing)
        self.config.get_text_config().vocab_size = self.vocab_size = rows
        self.set_spec(compose(self.config))
        self.language_model.config = self.spec.text
        remember_config(self)
        return self.get_input_embeddings()

    def _get_resized_embeddings(
        self, old_embeddings, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True
    ) -> nn.Embedding:
        """As transformers', including the rows beyond the vocabulary."""
        rows = new_num_tokens + self.spec.text.extra_embeddings
        return super()._get_resized_embeddings(
            old_embeddings, rows, pad_to_multiple_of, mean_resizing
        )

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        aspect_ratio_ids: torch.Tensor | None = None,
        aspect_ratio_mask: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> torch.Tensor:
        """Encode and project images. Arguments as in `forward`.

        Returns:
            [images, patches (or pooled tokens), text hidden size], for tiled images [B, images *
            tiles * patches, text hidden size]. `forward` and `generate` accept it as
            `image_features` in place of pixel_values.

        Raises:
            TypeError, ValueError: as the encoder; the model has no encoder.
        """
        if self.spec.encoder is None:
            raise ValueError(f"this {self.config.model_type} model takes text alone")
        check_built(self)
        tiles: dict[str, Any] = {
            "aspect_ratio_ids": aspect_ratio_ids,
            "aspect_ratio_mask": aspect_ratio_mask,
        }
        check_special(self, **tiles)
        choice = self._choose_features(
            vision_feature_layer, vision_feature_select_strategy, interpolate_pos_encoding
        )
        inputs = ModelInputs(pixel_values=pixel_values, choice=choice, **tiles)
        return self.encode_images(inputs)[0]

    def _choose_features(
        self, layer: int | list[int] | None, strategy: str | None, interpolate: bool | None
    ) -> FeatureChoice | None:
        """The states of the encoder that a call reads.

        Raises:
            ValueError: an argument is another family's, or a layer does not exist.
        """
        check_special(
            self,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            interpolate_pos_encoding=interpolate,
        )
        if self.spec.encoder is None:
            return None
        return choose_features(self.spec, layer, strategy, interpolate)

    def find_placeholders(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        images: int = 0,
        per_image: int | None = None,
    ) -> torch.Tensor:
        """Positions of image placeholders, bool [B, T]: see `MergeFusion.find_placeholders`."""
        check_built(self)
        return self.fusion.find_placeholders(input_ids, attention_mask, images, per_image)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        cache: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor | None = 0,
        image_features: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        prefix_length: torch.Tensor | None = None,
        aspect_ratio_ids: torch.Tensor | None = None,
        aspect_ratio_mask: torch.Tensor | None = None,
        cross_attention_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        past_key_values: Cache | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        cu_seq_lens_k: torch.Tensor | None = None,
        max_length_q: int | None = None,
        max_length_k: int | None = None,
        seq_idx: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        interpolate_pos_encoding: bool | None = None,
        mm_encoder_outputs: dict[str, ModelOutput] | None = None,
        cross_attention_states: torch.Tensor | None = None,
        prompt_length: int | None = None,
        **kwargs: Any,
    ) -> MllamaOutput | DecoderOutput | tuple:
        """
        Args:
            input_ids: int [B, T], with one placeholder per image feature. Placeholder ids may lie
                outside the vocabulary. With fusion="prepend" placeholders may be left out: visual
                tokens are then prepended, the same number of images per row. attention_mask,
                labels and position_ids describe the text alone, here and in later calls, and the
                outputs cover both. With fusion="cross_attention" there are no placeholders.
            pixel_values: float [images of the batch in row order, channels, image_size,
                image_size]; cast to the encoder's dtype. Ignored with a non-empty cache and no
                placeholders in input_ids. With fusion="cross_attention" the same number of images
                per row. Tiled models: float [B, images, tiles, channels, image_size, image_size].
                With a non-empty cache, cross-attention layers append them to the cached images.
            attention_mask: [B, past + T] of any dtype, zero where padded, on either side. Or [B or
                1, heads or 1, T, keys], bool (True: visible) or floats added to the scores; it
                replaces causality and a bidirectional prefix, position_ids and the loss ignore it,
                all as in transformers. It covers all slots of a static cache, and prepended visual
                tokens.
            labels: int [B, T], shifted inside: the logits at t are scored against the label at t +
                1. -100 (our own config's `ignore_index`), placeholders and padding are not trained.
                In packed rows the last position of a sequence is scored against the first label of
                the next, as in transformers, unless that is -100, as DataCollatorWithFlattening
                writes it.
            inputs_embeds: [B, T, hidden] in place of input_ids. Placeholders are then the positions
                that equal the embedding of `config.image_token_index`.
            cache: a transformers cache, dynamic or static, that keeps all tokens; not with
                activation checkpointing.
            position_ids: int [B or 1, T]. Default: the number of unmasked tokens before each.
                Without mask and cache, as in transformers, a position that is not its predecessor
                plus one starts a new sequence of a packed row, computed independently.
                Packed rows: token_type_ids may restart with every sequence, cross_attention_mask
                must be given, and visual tokens cannot be prepended.
            use_cache: return a cache. Default: outside training, as the decoder's config says, but
                not for packed rows (without a mask, where positions decrease within a row or the
                arguments below describe it; while compiling, with any position_ids).
            output_attentions, output_hidden_states: also return these fields of `MllamaOutput`.
            logits_to_keep: number of last positions to compute logits for (0: all), or their
                indices, as in transformers. None: no logits. With labels, the loss is then computed
                from the logits of a few positions at a time; without, returns `DecoderOutput`,
                whose last_hidden_state [B, T, hidden] covers the text alone, as `base_model` does.
            image_features: what `get_image_features` returned, in place of pixel_values.
            token_type_ids: int [B, T], for models with bidirectional prompts (PaliGemma): 0 for the
                prompt, 1 for the completion. Default: causal here, bidirectional in `generate`.
                Ignored with a non-empty cache, and by other models.
            prefix_length: int64 [B], length of the prompt at the front of each row, padding
                included: in place of token_type_ids.
            aspect_ratio_ids: int [B, images], 1 + the index of the image's aspect ratio in the
                config's list, 0 for no image. For tiled models (Llama-3.2-Vision).
            aspect_ratio_mask: [B, images, tiles], 1 for non-empty tiles. Default: derived from
                aspect_ratio_ids.
            cross_attention_mask: [B, T or past + T, images, tiles (1 if untiled)], 1
                where a token attends to a tile. For models with cross-attention layers. Later
                tokens use the last row. Default: every token attends to every tile of its row.
            return_dict: False returns a tuple.
            past_key_values: another name of `cache`, transformers' until 5.23.
            cu_seq_lens_q, cu_seq_lens_k: int [sequences + 1], start of each sequence in the
                concatenated rows, as DataCollatorWithFlattening returns them. All
                descriptions of packed rows must agree with each other and with position_ids, which
                are derived from them by default.
            max_length_q, max_length_k: length of the longest sequence.
            seq_idx: int [B or 1, T], the sequence that each token belongs to.
            vision_feature_layer, vision_feature_select_strategy: for LLaVA: which states of the
                encoder are read, and whether without the first feature ("default") or with it
                ("full"). Default: the config's.
            interpolate_pos_encoding: accept pixel_values of any size, [images, channels, height,
                width], by interpolating positions; an image then has one placeholder per patch.
                For SigLIP and CLIP encoders.
            mm_encoder_outputs: {"image": output of transformers' `get_image_features`}, whose
                `pooler_output` are the image_features.
            cross_attention_states: image_features under transformers' name for Llama-3.2-Vision, in
                any shape [..., hidden].
            prompt_length: ids from here on are text, never placeholders; set by `generate`.
            kwargs: `num_items_in_batch`, the number of labels in the whole (accumulated) batch:
                the loss is their sum divided by it instead of the mean. Names without meaning for
                these models (see `mllama.hf.arguments`) are ignored.

        Raises:
            ValueError: shapes do not fit, the numbers of placeholders and features differ, labels
                are out of range or none is trained (see `mllama.nn.loss.counted_loss`), an
                argument is another family's, or the config changed in a field that the model was
                built from.
            TypeError: an argument has the wrong type, or is unknown.
            IndexError: an id is outside the vocabulary.
        """
        check_keywords(type(self).__name__, MllamaForConditionalGeneration.forward, kwargs)
        check_built(self)
        check_text(input_ids, inputs_embeds, self.spec.text.hidden_size)
        given: dict[str, Any] = {
            "aspect_ratio_ids": aspect_ratio_ids,
            "aspect_ratio_mask": aspect_ratio_mask,
            "cross_attention_mask": cross_attention_mask,
        }
        check_special(
            self,
            **given,
            cross_attention_states=cross_attention_states,
            prefix_length=prefix_length,
            mm_encoder_outputs=mm_encoder_outputs,
        )
        inputs = ModelInputs(
            input_ids=input_ids,
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            token_type_ids=token_type_ids,
            prefix_length=prefix_length,
            pixel_values=pixel_values,
            image_features=one_of_images(
                pixel_values, image_features, mm_encoder_outputs, cross_attention_states
            ),
            choice=self._choose_features(
                vision_feature_layer, vision_feature_select_strategy, interpolate_pos_encoding
            ),
            labels=labels,
            num_items_in_batch=kwargs.get("num_items_in_batch"),
            logits_to_keep=logits_to_keep,
            **given,
        )
        if cross_attention_states is not None:
            inputs.image_features = by_rows(cross_attention_states, inputs.shape[0])
        packing = PackedRows(cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx)
        cache = one_cache(cache, past_key_values)
        cache = set_cache_and_positions(self, inputs, cache, use_cache, position_ids, packing)
        if prompt_length is not None:
            inputs.text_start = max(prompt_length - inputs.past, 0)
        set_extra_outputs(inputs, self.config, output_attentions, output_hidden_states)
        computed = self.compute(inputs)
        return_dict = self.config.return_dict if return_dict is None else return_dict
        headless = logits_to_keep is None and labels is None
        return as_output(computed, cache, headless, return_dict)


# The mapping is by class, but rejects a class with the name of one of transformers' own; the
# mapping of those is unchanged.
AutoModelForImageTextToText.register(MllamaConfig, MllamaForConditionalGeneration, exist_ok=True)
