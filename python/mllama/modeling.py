"""A vision-language model put together: tower -> projector -> fusion -> decoder -> head."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, Cache, DynamicCache, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.modeling_utils import slice_logits_to_keep

from mllama.config import MllamaConfig, check_reference
from mllama.families import Composition, compose
from mllama.fusion.cross_attention import CrossAttentionContext, CrossAttentionDecoderLayer, cross_context
from mllama.fusion.merge import find_placeholder, merge
from mllama.fusion.projector import LinearProjector, MultiModalProjector
from mllama.generation import MllamaGenerationMixin
from mllama.inputs import check_ids, check_range, check_tile_features, rows_of_mask
from mllama.loss import next_token_loss
from mllama.nn.norm import RMSNorm
from mllama.pretrained import PretrainedMixin, own_config
from mllama.text.cache import check_cache, past_length, place_cross_layers
from mllama.text.decoder import Decoder, check_mask
from mllama.text.prefix import count_prefix
from mllama.towers.clip import ClipVisionTower
from mllama.towers.siglip import SiglipVisionTower
from mllama.towers.tiled_vit import TiledVisionTower


@dataclass
class MllamaOutput(ModelOutput):
    """What the model returns; readable as `output.logits`, `output["logits"]` and by place. What is None is left out.

    Attributes:
        loss: float32 scalar, where labels were given.
        logits: [B, T, vocabulary], in the model's dtype.
        past_key_values: the cache, where one was used.
        hidden_states: the decoder's, layers + 1 of [B, T, hidden].
        attentions: the decoder's, one [B, heads, T, keys] float32 per layer.
        image_hidden_states: projected features [pictures, patches, hidden].
        image_attentions: the tower's, one [pictures, heads, patches, patches] float32 per layer.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None
    image_attentions: tuple[torch.Tensor, ...] | None = None


class MllamaForConditionalGeneration(PretrainedMixin, MllamaGenerationMixin, PreTrainedModel):
    """Answers about pictures, or goes on with text: a tower, a projector, a fusion and a decoder, as the config's family has them.

    Args:
        config: `mllama.MllamaConfig` for a SigLIP tower and a Llama decoder joined by early fusion; or transformers' own LlavaConfig,
            PaliGemmaConfig, MllamaConfig (Llama-3.2-Vision), LlamaConfig, GemmaConfig. The weights are random; `from_pretrained` reads a
            folder.
        reference: whose Llama-3.2-Vision to follow where the two differ, "meta" (as it was trained) or "hf" (as transformers computes it):
            the tower's intermediate features are the inputs or the outputs of the layers listed, and text before the first picture sees
            none or, by way of the residual, all of them. It may be set later, and means nothing to other families.

    Raises:
        TypeError: no config.
        ValueError: a family, a size, a choice or a reference that cannot be.
    """

    config_class = MllamaConfig
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    accepts_loss_kwargs = True
    supports_gradient_checkpointing = True
    load_options = frozenset({"reference"})
    _no_split_modules = ["SiglipEncoderLayer", "TiledEncoderLayer", "DecoderLayer", "CrossAttentionDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _tied_weights_keys = {"lm_head.weight": "language_model.embed_tokens.weight"}

    def __init__(self, config: PretrainedConfig, reference: str = "meta"):
        plan = compose(config)
        super().__init__(own_config(config))
        self.plan = plan
        self.reference = reference
        text = plan.text
        if plan.tower is not None:
            self.vision_tower = _TOWERS[plan.tower](plan.vision)
            self.multi_modal_projector = _projector(plan)
        self.language_model = Decoder(text, CrossAttentionDecoderLayer)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        if text.extra_embeddings:  # the head cannot be the embedding matrix, which has more rows
            self._tied_weights_keys = None
        self.post_init()

    @property
    def reference(self) -> str:
        """Whose Llama-3.2-Vision is followed: "meta" or "hf"."""
        return self._reference

    @reference.setter
    def reference(self, value: str) -> None:
        check_reference(value)
        self._reference = value

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, RMSNorm) and module.offset:
            nn.init.constant_(module.weight, 1 - module.offset)

    def get_input_embeddings(self) -> nn.Embedding:
        """The decoder's embedding matrix."""
        return self.language_model.embed_tokens

    def set_input_embeddings(self, value: nn.Embedding) -> None:
        """Put another embedding matrix in place."""
        self.language_model.embed_tokens = value

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        aspect_ratio_ids: torch.Tensor | None = None,
        aspect_ratio_mask: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode and project pictures. Arguments as `forward` has them.

        Returns:
            [pictures, patches, text hidden size], or of a model that cuts pictures into tiles [B, pictures * tiles * patches, text hidden
            size]; `forward` and `generate` take it as `image_features` in place of the pixels.

        Raises:
            TypeError, ValueError: as the tower. A model without a tower takes no pictures.
        """
        if self.plan.tower is None:
            raise ValueError(f"this {self.config.model_type} model takes text alone: it has no tower")
        if self.plan.fusion == "cross_attention":
            return self._encode_tiles(pixel_values, aspect_ratio_ids, aspect_ratio_mask)[0]
        return self._encode(pixel_values)[0]

    def _encode(self, pixel_values: torch.Tensor, output_attentions: bool = False) -> tuple[torch.Tensor, tuple | None]:
        read = self.plan.features
        several = read is not None and len(read) > 1
        encoded = self.vision_tower(
            pixel_values,
            output_hidden_states=several,
            output_attentions=output_attentions,
            final_norm=read is None,
            depth=None if read is None else max(read),
        )
        features = torch.cat([encoded.hidden_states[state] for state in read], -1) if several else encoded.last_hidden_state
        if self.plan.skip_first:
            features = features[:, 1:]
        return self.multi_modal_projector(features), encoded.attentions

    def _encode_tiles(
        self,
        pixel_values: torch.Tensor,
        aspect_ratio_ids: torch.Tensor | None,
        aspect_ratio_mask: torch.Tensor | None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, tuple | None]:
        encoded = self.vision_tower(
            pixel_values, aspect_ratio_ids, aspect_ratio_mask, reference=self.reference, output_attentions=output_attentions
        )
        return self.multi_modal_projector(encoded.last_hidden_state).flatten(1, 3), encoded.attentions

    def find_placeholders(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, pictures: int = 0) -> torch.Tensor:
        """Where picture placeholders stand: bool [B, T].

        With `config.image_token_index` these are the positions that hold it. Without, the id is told by `fusion.merge.find_placeholder`
        from the runs it stands in at unmasked positions; where none stands so, no position is one.

        Args:
            input_ids: int [B, T].
            attention_mask: [B, T], zero where padded, or None.
            pictures: how many pictures the batch has.

        Raises:
            ValueError: the id is not set, and more than one could be it.
        """
        if self.plan.fusion is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        token = self.config.image_token_index
        if token is not None:
            return input_ids == token
        if pictures:
            token = find_placeholder(input_ids, attention_mask, self.plan.image_tokens, pictures)
        if token is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == token if attention_mask is None else (input_ids == token) & (attention_mask != 0)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        past_key_values: Cache | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        image_features: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        prefix_length: torch.Tensor | None = None,
        aspect_ratio_ids: torch.Tensor | None = None,
        aspect_ratio_mask: torch.Tensor | None = None,
        cross_attention_mask: torch.Tensor | None = None,
        return_dict: bool | None = None,
        **kwargs,
    ) -> MllamaOutput | tuple:
        """
        Args:
            input_ids: int [B, T], with one placeholder per feature. Placeholder ids may lie outside the vocabulary.
            pixel_values: float [pictures of the batch in row order, channels, image_size, image_size]; cast to the tower's dtype. With a
                filled cache and no placeholders in input_ids they are ignored. Of a model that cuts pictures into tiles, float
                [B, pictures, tiles, channels, image_size, image_size]; with a filled cache they come after the pictures in it.
            attention_mask: [B, past + T] of any dtype, zero where padded, on either side.
            labels: int [B, T], shifted inside: the logits at t are scored against the label at t + 1. -100 (our own config's
                `ignore_index`), placeholder and padding positions are not trained.
            inputs_embeds: [B, T, hidden] in place of input_ids; pictures must be merged already.
            past_key_values: a transformers cache, dynamic or static, that keeps all tokens; not while activations are checkpointed.
            position_ids: int [B or 1, T]. None counts the unmasked tokens of each row.
            use_cache: return a cache; None asks for one outside training, as the decoder's config says.
            output_attentions, output_hidden_states: also return what `MllamaOutput` says.
            logits_to_keep: last positions to compute logits for (0: all), or which ones, as transformers takes it.
            image_features: what `get_image_features` gave, in place of pixel_values.
            token_type_ids: int [B, T], of a model whose prompts are seen both ways (PaliGemma): 0 for the prompt, then 1 for what is to be
                said. None: all of it is seen one way here, and both ways by `generate`. With a filled cache, and by other models, they are
                not read.
            prefix_length: int64 [B], how many positions at a row's front, padding included, are the prompt: in place of token_type_ids.
            aspect_ratio_ids: int [B, pictures], 1 + the place of a picture's arrangement of tiles in the config's list, 0 for no picture;
                with pixel_values, of a model that cuts pictures into tiles (Llama-3.2-Vision).
            aspect_ratio_mask: [B, pictures, tiles], 1 where a tile is filled; by default as aspect_ratio_ids say.
            cross_attention_mask: [B, T or past + T, pictures, tiles], 1 where a token sees a tile, of the same model. What comes after
                its last row sees what that row sees. None: every token sees every tile.
            return_dict: False returns a tuple.
            kwargs: `num_items_in_batch`, the labels of the whole (accumulated) batch, makes the loss their sum divided by it instead of
                their mean. Anything else is passed over, as in transformers.

        Raises:
            ValueError: shapes that do not fit, placeholders that are not as many as features, labels out of range.
            TypeError: tensors of a wrong kind.
            IndexError: an id outside the vocabulary.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        check_cache(past_key_values)
        check_mask(attention_mask)
        config = self.config
        output_attentions = bool(config.output_attentions if output_attentions is None else output_attentions)
        output_hidden_states = bool(config.output_hidden_states if output_hidden_states is None else output_hidden_states)
        use_cache = self.plan.text.use_cache and not self.training if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache(config=self.plan.text)
        if past_key_values is not None and self.training and self.is_activation_checkpointing:  # its layers would be called without it
            raise ValueError("past_key_values cannot be kept while activations are checkpointed: call model.eval(), or set use_cache=False")
        filled = past_key_values is not None and int(past_key_values.get_seq_length()) > 0

        if input_ids is not None:
            check_ids(input_ids)
            if attention_mask is not None and attention_mask.shape[0] != input_ids.shape[0]:
                raise ValueError(f"attention_mask must have {input_ids.shape[0]} rows, as input_ids, got {attention_mask.shape[0]}")
        if pixel_values is not None and image_features is not None:
            raise ValueError("give pixel_values or image_features, not both")
        if (pixel_values is not None or image_features is not None) and self.plan.tower is None:
            raise ValueError(f"pixel_values and image_features are for models with a tower; this {config.model_type} takes text alone")
        if self.plan.fusion == "cross_attention":
            seen = self._attend(
                input_ids,
                inputs_embeds,
                pixel_values,
                image_features,
                (aspect_ratio_ids, aspect_ratio_mask),
                cross_attention_mask,
                past_key_values,
                output_attentions,
            )
        else:
            seen = self._merge(input_ids, inputs_embeds, attention_mask, pixel_values, image_features, filled, output_attentions)

        if filled or not self.plan.prefix:
            prefix_length = None
        elif token_type_ids is not None:
            prefix_length = count_prefix(token_type_ids, attention_mask, seen.embeds.shape[:2])
        decoded = self.language_model(
            inputs_embeds=seen.embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            prefix_length=prefix_length,
            cross=seen.cross,
        )
        logits = self.lm_head(slice_logits_to_keep(decoded.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss = next_token_loss(
                logits,
                labels,
                seen.embeds.shape[:2],
                attention_mask,
                seen.placeholders,
                self.plan.ignore_index,
                kwargs.get("num_items_in_batch"),
            )

        output = MllamaOutput(
            loss=loss,
            logits=logits,
            past_key_values=decoded.past_key_values,
            hidden_states=decoded.hidden_states,
            attentions=decoded.attentions,
            image_hidden_states=seen.features,
            image_attentions=seen.attentions,
        )
        if return_dict is None:
            return_dict = config.return_dict
        return output if return_dict else output.to_tuple()

    def _merge(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        filled: bool,
        output_attentions: bool,
    ) -> "_Seen":
        """Embeddings with picture features in the placeholders' places."""
        if input_ids is None:
            if pixel_values is not None or image_features is not None:
                raise ValueError("pictures need input_ids, whose placeholders tell where they stand; inputs_embeds must hold them already")
            return _Seen(inputs_embeds)
        pictures = self._count_pictures(pixel_values, image_features)
        placeholders = attentions = None
        if self.plan.fusion is not None and (pictures or not filled):
            placeholders = self._placeholders(input_ids, attention_mask, pictures, filled)
        if placeholders is None:
            pixel_values = image_features = None
        elif pixel_values is not None:
            image_features, attentions = self._encode(pixel_values, output_attentions)
        inputs_embeds = self._embed(input_ids, placeholders)
        if image_features is not None:
            inputs_embeds = merge(inputs_embeds, placeholders, image_features)
        return _Seen(inputs_embeds, placeholders, image_features, attentions)

    def _attend(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        aspects: tuple[torch.Tensor | None, torch.Tensor | None],
        cross_attention_mask: torch.Tensor | None,
        past_key_values: Cache | None,
        output_attentions: bool,
    ) -> "_Seen":
        """Embeddings, and what the cross-attention layers need: nothing where there are no pictures, here or in the cache."""
        placeholders = attentions = None
        if inputs_embeds is None:
            placeholders = self.find_placeholders(input_ids)
            inputs_embeds = self._embed(input_ids)
        cached, text, rows = None, self.plan.text, inputs_embeds.shape[0]
        tokens = self.vision_tower.tokens_per_tile
        if pixel_values is not None:
            self.vision_tower.check(pixel_values, *aspects)
            if pixel_values.shape[0] != rows:
                raise ValueError(f"pixel_values must have {rows} rows, one per row of text, got {pixel_values.shape[0]}")
            image_features, attentions = self._encode_tiles(pixel_values, *aspects, output_attentions)
        elif image_features is not None:
            check_tile_features(image_features, rows, tokens, text.hidden_size)
        if image_features is not None:
            image_features = image_features.to(inputs_embeds.dtype)
        if past_key_values is not None:
            cached = place_cross_layers(past_key_values, text.cross_attention_layers, text.num_hidden_layers)
        mask = rows_of_mask(cross_attention_mask, inputs_embeds.shape[:2], past_length(past_key_values))
        held = None if cached is None else cached.kept
        cross = cross_context(image_features, mask, tokens, self.reference, held=held, filled=aspects[1])
        if cached is not None and cross is not None:
            cached.kept = cross.kept
        return _Seen(inputs_embeds, placeholders, image_features, attentions, cross)

    def _count_pictures(self, pixel_values: torch.Tensor | None, image_features: torch.Tensor | None) -> int:
        if pixel_values is not None:
            self.vision_tower.check(pixel_values)
            return pixel_values.shape[0]
        if image_features is None:
            return 0
        if not isinstance(image_features, torch.Tensor):
            raise TypeError(f"image_features must be a torch.Tensor, got {type(image_features).__name__}")
        wanted = [self.plan.image_tokens, self.plan.text.hidden_size]
        if list(image_features.shape[1:]) != wanted:
            raise ValueError(f"image_features must be [pictures, {wanted[0]}, {wanted[1]}], got {list(image_features.shape)}")
        return image_features.shape[0]

    def _placeholders(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, pictures: int, filled: bool = False
    ) -> torch.Tensor | None:
        """bool [B, T] with as many True as there are features; None where a filled cache already holds the pictures given again."""
        if attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        placeholders = self.find_placeholders(input_ids, attention_mask, pictures)
        if torch.compiler.is_compiling():
            return placeholders
        per_picture = self.plan.image_tokens
        rows = placeholders.sum(1).tolist()
        found = sum(rows)
        if filled and not found:
            return None
        if found != pictures * per_picture:
            unexpanded = "; expand each <image> with the processor (MllamaImageProcessor)" if found <= pictures else ""
            raise ValueError(
                f"input_ids hold {found} picture placeholders, but {pictures} pictures give {pictures * per_picture} features{unexpanded}"
            )
        if any(row % per_picture for row in rows):
            raise ValueError(f"every row must hold a multiple of {per_picture} picture placeholders, got {rows}")
        return placeholders

    def _embed(self, input_ids: torch.Tensor, placeholders: torch.Tensor | None = None) -> torch.Tensor:
        """[B, T, hidden]: looked-up ids. Placeholders, which may lie outside the vocabulary, are not."""
        if placeholders is not None:
            input_ids = input_ids.masked_fill(placeholders, 0)
        check_range(input_ids, self.get_input_embeddings().weight.shape[0])
        return self.get_input_embeddings()(input_ids)


@dataclass
class _Seen:
    """What the decoder starts from: embeddings, where the placeholders are, and what became of the pictures."""

    embeds: torch.Tensor
    placeholders: torch.Tensor | None = None
    features: torch.Tensor | None = None
    attentions: tuple | None = None
    cross: CrossAttentionContext | None = None


_TOWERS = {"siglip": SiglipVisionTower, "clip": ClipVisionTower, "tiled": TiledVisionTower}


def _projector(plan: Composition) -> nn.Module:
    features, inner, text = plan.projector_sizes
    if plan.projector == "linear":
        return LinearProjector(features, text, plan.projector_bias)
    return MultiModalProjector(features, inner, text, plan.projector_act, plan.projector_bias)


# The mapping is by class, but refuses a class whose name one of transformers' own bears; theirs stays what it was.
AutoModelForImageTextToText.register(MllamaConfig, MllamaForConditionalGeneration, exist_ok=True)
