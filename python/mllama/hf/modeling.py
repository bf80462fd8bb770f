"""A vision-language model put together: tower -> projector -> fusion -> decoder -> head."""

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    Cache,
    DynamicCache,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import slice_logits_to_keep
from transformers.utils.generic import ModelOutput

from mllama.config.checks import check_reference, check_size
from mllama.config.spec import ModelSpec
from mllama.encoders.clip import ClipVisionTower
from mllama.encoders.siglip import SiglipVisionTower
from mllama.encoders.tiled_vit import TiledVisionTower
from mllama.families.compose import compose
from mllama.fusion.cross_attention import CrossAttentionDecoderLayer
from mllama.fusion.prepend import check_texts_own, lengthen, shift_positions
from mllama.fusion.projector import (
    AveragePooling,
    LearnedPooling,
    LinearProjector,
    MultiModalProjector,
)
from mllama.hf.arguments import check_keywords, check_special
from mllama.hf.backbone import Backbone
from mllama.hf.built import check_built, remember_config
from mllama.hf.cache import TransformersCache
from mllama.hf.compat import CacheOutput, DecoderOutput, NextTokenModel, one_cache
from mllama.hf.configs import MllamaConfig
from mllama.hf.generation import MllamaGenerationMixin
from mllama.hf.images import PicturesMixin
from mllama.hf.pretrained import PretrainedMixin, own_config
from mllama.model.inputs import by_rows, check_ids, one_of_images
from mllama.nn.activation import softcap
from mllama.nn.loss import counted_loss
from mllama.nn.norm import RMSNorm
from mllama.text.decoder import Decoder, check_embeddings, check_mask, split_mask
from mllama.text.packing import find_sequences, go_back
from mllama.text.prefix import count_prefix


@dataclass
class MllamaOutput(CacheOutput):
    """What the model returns; readable as `output.logits`, `output["logits"]` and by place. What is
    None is left out.

    Attributes:
        loss: float32 scalar, where labels were given.
        logits: [B, T, vocabulary], in the model's dtype; of a text that visual tokens were put
            before, theirs come first.
        cache: the key-value cache, where one was used; also read as `past_key_values`.
        hidden_states: the decoder's, layers + 1 of [B, T, hidden].
        attentions: the decoder's, one [B, heads, T, keys] float32 per layer.
        image_hidden_states: projected features [pictures, patches, hidden], as `get_image_features`
            gives them.
        image_attentions: the tower's, one [pictures, heads, patches, patches] float32 per layer.
        num_trained_tokens: int64 scalar, the labels that the loss was taken over, where labels were
            given.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    cache: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    image_attentions: tuple[torch.Tensor, ...] | None = None
    num_trained_tokens: torch.Tensor | None = None

    @property
    def image_outputs(self) -> BaseModelOutputWithPooling | None:
        """The tower's part as transformers 5.24 returns it: `image_hidden_states` as
        `pooler_output`, and `attentions`.
        """
        if self.image_hidden_states is None:
            return None
        return BaseModelOutputWithPooling(
            pooler_output=self.image_hidden_states, attentions=self.image_attentions
        )


class MllamaForConditionalGeneration(
    NextTokenModel, PretrainedMixin, MllamaGenerationMixin, PicturesMixin, PreTrainedModel
):
    """Answers about pictures, or goes on with text: a tower, a projector, a fusion and a decoder,
    as the config's family has them.

    Args:
        config: `mllama.MllamaConfig` for a SigLIP tower and a Llama decoder joined in one of three
            ways; or transformers' own LlavaConfig, PaliGemmaConfig, MllamaConfig
            (Llama-3.2-Vision), LlamaConfig, GemmaConfig, Gemma2Config, Gemma3TextConfig. The
            weights are random; `from_pretrained` reads a folder.
        reference: whose Llama-3.2-Vision to follow where the two differ, "meta" (as it was trained)
            or "hf" (as transformers computes it): the tower's intermediate features are the inputs
            or the outputs of the layers listed, and text before the first picture sees none or, by
            way of the residual, all of them. It may be set later, and means nothing to other
            families.

    Raises:
        TypeError: no config.
        ValueError: a family, a size, a choice or a reference that cannot be.
    """

    config_class = MllamaConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")  # type: ignore[assignment]  # as transformers' own models have it
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
        spec = self.make_spec(config)
        super().__init__(own_config(config))
        self.spec = spec
        self.reference = reference
        text = spec.text
        if spec.encoder is not None:
            self.vision_tower = _TOWERS[spec.encoder](spec.vision)
            self.multi_modal_projector = make_projector(spec)
        if spec.pooling is not None:
            self.image_pooling = make_pooling(spec)
        self.language_model = Decoder(text, CrossAttentionDecoderLayer)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if text.extra_embeddings:  # the head cannot be the embedding matrix, which has more rows
            self._tied_weights_keys = None  # type: ignore[assignment]
        self.__dict__["_backbone"] = Backbone(
            self, MllamaForConditionalGeneration.forward
        )  # no child: its parameters are the model's own
        self.post_init()
        remember_config(self)

    make_spec = staticmethod(compose)  # a subclass may read further fields

    @property
    def reference(self) -> str:
        """Whose Llama-3.2-Vision is followed: "meta" or "hf"."""
        return self._reference

    @reference.setter
    def reference(self, value: str) -> None:
        check_reference(value)
        self._reference = value

    @property
    def model(self) -> Backbone:
        """The model without its head, which `base_model` is, too: called as the model is, it
        returns last_hidden_state.
        """
        return self._backbone.follow()  # type: ignore[union-attr,operator]

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RMSNorm) and module.offset:
            nn.init.constant_(module.weight, 1 - module.offset)

    def get_input_embeddings(self) -> nn.Embedding:
        """The decoder's embedding matrix."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:  # type: ignore[override]
        """Put another embedding matrix in place."""
        self.language_model.embed_tokens = value

    def resize_token_embeddings(
        self,
        new_num_tokens: int | None = None,
        pad_to_multiple_of: int | None = None,
        mean_resizing: bool = True,
    ) -> nn.Embedding:
        """As transformers': the vocabulary gets `new_num_tokens`. An embedding matrix with rows
        beyond it (Llama-3.2-Vision: 8, the placeholder's among them) has as many beyond the new
        one, and every row that was there stays at its id.

        Raises:
            ValueError: a size that cannot be, or that leaves out the placeholder's row.
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
                f"new_num_tokens must be at least {token + 1 - extra}, for the placeholder {token} to keep its row; got {rows}"
            )
        super().resize_token_embeddings(rows, None, mean_resizing)
        self.config.get_text_config().vocab_size = self.vocab_size = rows
        self.spec = self.make_spec(self.config)
        self.language_model.config = self.spec.text
        remember_config(self)
        return self.get_input_embeddings()

    def _get_resized_embeddings(
        self, old_embeddings, new_num_tokens=None, pad_to_multiple_of=None, mean_resizing=True
    ) -> nn.Embedding:
        """As transformers', with the rows beyond the vocabulary."""
        rows = new_num_tokens + self.spec.text.extra_embeddings
        return super()._get_resized_embeddings(
            old_embeddings, rows, pad_to_multiple_of, mean_resizing
        )

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
            input_ids: int [B, T], with one placeholder per feature. Placeholder ids may lie outside
                the vocabulary. With fusion="prepend" they may be the text alone: the visual tokens
                are put before it, as many pictures to every row; mask, labels and positions stay
                the text's, here and in later calls, and what is returned covers both. With
                fusion="cross_attention" they are the text alone.
            pixel_values: float [pictures of the batch in row order, channels, image_size,
                image_size]; cast to the tower's dtype. With a filled cache and no placeholders in
                input_ids they are ignored. With fusion="cross_attention" as many to every row. Of a
                model that cuts pictures into tiles, float [B, pictures, tiles, channels,
                image_size, image_size]. Where layers attend to pictures, with a filled cache they
                come after those in it.
            attention_mask: [B, past + T] of any dtype, zero where padded, on either side. Or [B or
                1, heads or 1, T, keys], bool (True where a position sees a key) or floats that are
                added to the scores: it is taken as it is, in place of causality and of a prompt's
                prefix, positions are counted without it, and of the loss it leaves out nothing, all
                as in transformers. It covers all of a static cache's slots, and visual tokens
                before the text.
            labels: int [B, T], shifted inside: the logits at t are scored against the label at t +
                1. -100 (our own config's `ignore_index`), placeholder and padding positions are not
                trained. Of several sequences in one row the last position of one is scored against
                the first label of the next, as in transformers, unless that is -100, as
                DataCollatorWithFlattening writes it.
            inputs_embeds: [B, T, hidden] in place of input_ids. Where pictures are merged, the
                placeholders are the positions that equal the embedding of
                `config.image_token_index`.
            cache: a transformers cache, dynamic or static, that keeps all tokens; not while
                activations are checkpointed.
            position_ids: int [B or 1, T]. None counts the unmasked tokens of each row. Without mask
                and cache, as in transformers, a position that is not one more than the one before
                it begins another sequence of a packed row: each is as if alone. Of packed rows,
                token_type_ids may begin anew with every sequence, cross_attention_mask must say
                which position sees which picture, and visual tokens cannot stand before the text.
            use_cache: return a cache; None asks for one outside training, as the decoder's config
                says, but not of packed rows: without a mask, where positions go back within a row
                or the arguments below describe it, and, while compiling, when values cannot be
                read, with any position_ids.
            output_attentions, output_hidden_states: also return what `MllamaOutput` says.
            logits_to_keep: last positions to compute logits for (0: all), or which ones, as
                transformers takes it. None: no logits, and `DecoderOutput` is returned, whose
                last_hidden_state is [B, T, hidden], of the text alone. `base_model` asks for it.
            image_features: what `get_image_features` gave, in place of pixel_values.
            token_type_ids: int [B, T], of a model whose prompts are seen both ways (PaliGemma): 0
                for the prompt, then 1 for what is to be said. None: all of it is seen one way here,
                and both ways by `generate`. With a filled cache, and by other models, they are not
                read.
            prefix_length: int64 [B], how many positions at a row's front, padding included, are the
                prompt: in place of token_type_ids.
            aspect_ratio_ids: int [B, pictures], 1 + the place of a picture's arrangement of tiles
                in the config's list, 0 for no picture; with pixel_values, of a model that cuts
                pictures into tiles (Llama-3.2-Vision).
            aspect_ratio_mask: [B, pictures, tiles], 1 where a tile is filled; by default as
                aspect_ratio_ids say.
            cross_attention_mask: [B, T or past + T, pictures, tiles (1 where there are none)], 1
                where a token sees a tile, of a model whose layers attend to pictures. What comes
                after its last row sees what that row sees. None: every token sees every tile of its
                row.
            return_dict: False returns a tuple.
            past_key_values: another name of `cache`, transformers' until 5.23.
            cu_seq_lens_q, cu_seq_lens_k, max_length_q, max_length_k, seq_idx: packed rows, as
            DataCollatorWithFlattening describes them:
                int [sequences + 1], where each begins in the rows laid end to end; the longest
                one's length; int [B or 1, T], which of them each token belongs to. They must agree
                with each other and with position_ids, which None makes of them.
            vision_feature_layer, vision_feature_select_strategy: of LLaVA, which states of the
                tower are read, and whether without the first feature ("default") or with it
                ("full"), in place of what the config says.
            interpolate_pos_encoding: take pixel_values of any size, [pictures, channels, height,
                width], with positions between the learned ones; a picture has as many placeholders
                as patches. Of SigLIP and CLIP towers.
            mm_encoder_outputs: {"image": what transformers' `get_image_features` gave}, whose
                `pooler_output` are image_features.
            cross_attention_states: image_features under the name, and in any shape [..., hidden],
                that transformers' Llama-3.2-Vision takes.
            prompt_length: ids from here on are text, whatever they are: what `generate` has added.
            kwargs: `num_items_in_batch`, the labels of the whole (accumulated) batch, makes the
                loss their sum divided by it instead of their mean. Names that mean nothing in these
                models (`mllama.hf.arguments` lists them) are passed over.

        Raises:
            ValueError: shapes that do not fit, placeholders that are not as many as features,
                labels out of range, labels of which none is trained (see
                `mllama.nn.loss.counted_loss`); an argument of another family; a config that was
                changed in what the model is built from.
            TypeError: tensors of a wrong kind; an argument that is not known.
            IndexError: an id outside the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        check_keywords(type(self).__name__, MllamaForConditionalGeneration.forward, kwargs)
        check_built(self)
        check_special(
            self.spec,
            self.config.model_type,
            aspect_ratio_ids=aspect_ratio_ids,
            aspect_ratio_mask=aspect_ratio_mask,
            cross_attention_mask=cross_attention_mask,
            cross_attention_states=cross_attention_states,
            prefix_length=prefix_length,
            mm_encoder_outputs=mm_encoder_outputs,
        )
        reading = self._reading(
            vision_feature_layer, vision_feature_select_strategy, interpolate_pos_encoding
        )
        image_features = one_of_images(
            pixel_values, image_features, mm_encoder_outputs, cross_attention_states
        )
        if cross_attention_states is not None:
            rows = len(input_ids if inputs_embeds is None else inputs_embeds)  # type: ignore[arg-type]
            image_features = by_rows(cross_attention_states, rows)
        if labels is not None and logits_to_keep is None:
            raise ValueError("labels need logits; leave logits_to_keep at 0")
        cache = one_cache(cache, past_key_values)
        check_mask(attention_mask)
        config = self.config
        text = getattr(
            config, "text_config", config
        )  # where transformers reads these; set on the whole they count too
        if output_attentions is None:
            output_attentions = config.output_attentions or text.output_attentions
        if output_hidden_states is None:
            output_hidden_states = config.output_hidden_states or text.output_hidden_states
        if input_ids is not None:
            check_ids(input_ids)
        else:
            check_embeddings(inputs_embeds, self.spec.text.hidden_size)  # type: ignore[arg-type]
        rows, length = (inputs_embeds if input_ids is None else input_ids).shape[:2]  # type: ignore[union-attr]
        padding_mask, attn_mask = split_mask(attention_mask)
        if padding_mask is not None and (
            padding_mask.shape[0] != rows or padding_mask.shape[1] < length
        ):
            raise ValueError(
                f"attention_mask must be [{rows}, past + {length}], as the tokens, got {list(padding_mask.shape)}"
            )
        packing = {
            "cu_seq_lens_q": cu_seq_lens_q,
            "cu_seq_lens_k": cu_seq_lens_k,
            "max_length_q": max_length_q,
            "max_length_k": max_length_k,
            "seq_idx": seq_idx,
        }
        if use_cache is None:
            packed = attention_mask is None and (
                go_back(position_ids) or any(value is not None for value in packing.values())
            )
            use_cache = (
                not self.training
                and not packed
                and text.use_cache
                and getattr(config, "use_cache", True)
            )
        unpacking = {
            "attention_mask": attention_mask is not None,
            "cache": cache is not None,
            "use_cache": bool(use_cache),
        }
        obstacle = next((name for name, given in unpacking.items() if given), None)
        position_ids, first_key = find_sequences((rows, length), position_ids, obstacle, **packing)
        if use_cache and cache is None:
            cache = DynamicCache()
        wrapped = None if cache is None else TransformersCache(cache, self.spec.text)
        if (
            cache is not None and self.training and self.is_activation_checkpointing
        ):  # its layers would be called without it
            raise ValueError(
                "cache cannot be kept while activations are checkpointed: call model.eval(), or set use_cache=False"
            )
        past = 0 if wrapped is None else int(wrapped.length)
        filled = past > 0

        if (pixel_values is not None or image_features is not None) and self.spec.encoder is None:
            raise ValueError(
                f"pixel_values and image_features are for models with a tower; this {config.model_type} takes text alone"
            )
        if self.spec.fusion == "cross_attention":
            seen = self._attend(
                input_ids,
                inputs_embeds,
                pixel_values,
                image_features,
                (aspect_ratio_ids, aspect_ratio_mask),
                cross_attention_mask,
                wrapped,
                output_attentions,
            )
            if first_key is not None and seen.cross is not None:
                _check_cross_mask_of_packed(cross_attention_mask, length)
        else:
            held = 0 if wrapped is None or not filled else wrapped.num_prefix_tokens
            pictures = (pixel_values, image_features, reading)
            told = None if prompt_length is None else max(prompt_length - past, 0)
            seen = self._merge(
                input_ids,
                inputs_embeds,
                padding_mask,
                pictures,
                filled,
                held,
                output_attentions,
                told,
            )
            if self.spec.fusion == "prepend" and wrapped is not None and not filled:
                wrapped.num_prefix_tokens = seen.before_text
            if visual := held + seen.before_text:
                if first_key is not None and not torch.compiler.is_compiling():
                    raise ValueError(
                        "position_ids must be of one sequence per row: they restart, and visual tokens stand before the text"
                    )
                first_key = None  # the decoder finds it in positions that cover both
                check_texts_own("attention_mask", padding_mask, past - held + length, visual)
                check_texts_own("position_ids", position_ids, length, visual)
                check_texts_own("labels", labels, length, visual)
                padding_mask = lengthen(padding_mask, visual, 1)
                position_ids = shift_positions(position_ids, held, seen.before_text)
                labels = lengthen(labels, seen.before_text, self.spec.ignore_index)

        if filled or not self.spec.bidirectional_prefix:
            prefix_length = None
        elif (
            prefix_length is not None
            and first_key is not None
            and not torch.compiler.is_compiling()
        ):
            raise ValueError(
                "prefix_length must be None where position_ids restart: token_type_ids tell the prompt of each sequence"
            )
        elif token_type_ids is not None and attn_mask is None:
            prefix_length = count_prefix(
                token_type_ids, padding_mask, seen.embeds.shape[:2], first_key
            )
        decoded = self.language_model(
            inputs_embeds=seen.embeds,
            attention_mask=padding_mask if attn_mask is None else attn_mask,
            position_ids=position_ids,
            cache=wrapped,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            prefix_length=prefix_length,
            first_key=first_key,
            cross=seen.cross,
        )
        if return_dict is None:
            return_dict = config.return_dict
        if logits_to_keep is None:
            headless = DecoderOutput(
                last_hidden_state=decoded.last_hidden_state[:, seen.before_text :],
                cache=cache,
                hidden_states=decoded.hidden_states,
                attentions=decoded.attentions,
            )
            return headless if return_dict else headless.to_tuple()
        logits = self.lm_head(slice_logits_to_keep(decoded.last_hidden_state, logits_to_keep))
        logits = softcap(logits, self.spec.text.final_logit_softcapping)
        loss = num_trained_tokens = None
        if labels is not None:
            loss, num_trained_tokens = counted_loss(
                logits,
                labels,
                seen.embeds.shape[:2],
                padding_mask,
                seen.placeholders,
                self.spec.ignore_index,
                kwargs.get("num_items_in_batch"),
            )

        output = MllamaOutput(
            loss=loss,
            logits=logits,
            cache=cache,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            image_hidden_states=seen.features,
            image_attentions=seen.attentions,
            num_trained_tokens=num_trained_tokens,
        )
        return output if return_dict else output.to_tuple()


def _check_cross_mask_of_packed(mask: torch.Tensor | None, length: int) -> None:
    """A sequence that no mask keeps from the pictures of the others would see them."""
    if not torch.compiler.is_compiling() and (mask is None or mask.shape[1] != length):
        given = "None" if mask is None else list(mask.shape)
        raise ValueError(
            f"cross_attention_mask must say for each of {length} positions what it sees: position_ids restart; got {given}"
        )


_TOWERS = {"siglip": SiglipVisionTower, "clip": ClipVisionTower, "tiled": TiledVisionTower}


def make_projector(spec: ModelSpec) -> nn.Module:
    features, inner, text = spec.projector_sizes
    if spec.projector == "linear":
        return LinearProjector(features, text, spec.projector_bias)
    return MultiModalProjector(features, inner, text, spec.projector_act, spec.projector_bias)


def make_pooling(spec: ModelSpec) -> nn.Module:
    if spec.pooling == "average":
        return AveragePooling(spec.tokens_per_image)
    return LearnedPooling(
        (spec.vision.image_size // spec.vision.patch_size) ** 2, spec.tokens_per_image
    )


# The mapping is by class, but refuses a class whose name one of transformers' own bears; theirs
# stays what it was.
AutoModelForImageTextToText.register(MllamaConfig, MllamaForConditionalGeneration, exist_ok=True)
