"""How pictures reach the decoder: encoded, and written into its embeddings or handed to its
cross-attention layers.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from mllama.config.parts import select_features
from mllama.fusion.cross_attention import CrossAttentionContext, cross_context
from mllama.fusion.merge import find_placeholder, merge
from mllama.fusion.prepend import share_out
from mllama.hf.arguments import check_special
from mllama.hf.built import check_built
from mllama.hf.cache import TransformersCache
from mllama.model.inputs import check_blind, check_range, check_tile_features, rows_of_mask
from mllama.text.decoder import check_embeddings


@dataclass
class Seen:
    """What the decoder starts from: embeddings, where the placeholders are, what became of the
    pictures, and how many visual tokens stand before the text in the embeddings that are none of
    its own.
    """

    embeds: torch.Tensor
    placeholders: torch.Tensor | None = None
    features: torch.Tensor | None = None
    attentions: tuple | None = None
    cross: CrossAttentionContext | None = None
    before_text: int = 0


class Reading(NamedTuple):
    """How one call reads pictures.

    Attributes:
        features: which of the tower's states, as `ModelSpec.features`.
        skip_first: leave out the first feature of each.
        interpolate: pixels may be of any size.
        told: the call itself said one of these.
    """

    features: tuple[int, ...] | None
    skip_first: bool
    interpolate: bool
    told: bool


class PicturesMixin:
    """The part of a model between `forward`'s arguments and its decoder; `spec` says what there is."""

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        aspect_ratio_ids: torch.Tensor | None = None,
        aspect_ratio_mask: torch.Tensor | None = None,
        vision_feature_layer: int | list[int] | None = None,
        vision_feature_select_strategy: str | None = None,
        interpolate_pos_encoding: bool | None = None,
    ) -> torch.Tensor:
        """Encode and project pictures. Arguments as `forward` has them.

        Returns:
            [pictures, patches (or what they are pooled to), text hidden size], or of a model that
            cuts pictures into tiles [B, pictures * tiles * patches, text hidden size]; `forward`
            and `generate` take it as `image_features` in place of the pixels.

        Raises:
            TypeError, ValueError: as the tower. A model without a tower takes no pictures.
        """
        if self.spec.encoder is None:
            raise ValueError(
                f"this {self.config.model_type} model takes text alone: it has no tower"
            )
        check_built(self)
        kind = self.config.model_type
        check_special(
            self.spec, kind, aspect_ratio_ids=aspect_ratio_ids, aspect_ratio_mask=aspect_ratio_mask
        )
        reading = self._reading(
            vision_feature_layer, vision_feature_select_strategy, interpolate_pos_encoding
        )
        if self.spec.encoder == "tiled":
            return self._encode_tiles(pixel_values, aspect_ratio_ids, aspect_ratio_mask)[0]
        return self._encode(pixel_values, reading)[0]

    def _reading(
        self, layer: int | list[int] | None, strategy: str | None, interpolate: bool | None
    ) -> Reading:
        """How pictures are read: as the call says, else as the config does.

        Raises:
            ValueError: an argument of another family; layers that are none, or that the projector
                is too wide or too narrow for.
        """
        spec = self.spec
        given = {
            "vision_feature_layer": layer,
            "vision_feature_select_strategy": strategy,
            "interpolate_pos_encoding": interpolate,
        }
        told = any(value is not None and value is not False for value in given.values())
        if told:
            check_special(spec, self.config.model_type, **given)
        features, skip = spec.feature_layers, spec.skip_first
        if layer is not None or strategy is not None:
            features, skip = select_features(
                features if layer is None else layer,  # type: ignore[arg-type]
                ("default" if skip else "full") if strategy is None else strategy,
                spec.vision.num_hidden_layers + 1,
            )
        if (
            features is not None
            and len(features) * spec.vision.hidden_size != spec.projector_sizes[0]
        ):
            wanted = spec.projector_sizes[0] // spec.vision.hidden_size
            raise ValueError(
                f"vision_feature_layer must name {wanted} states, as many as the projector is wide for; got {layer!r}"
            )
        return Reading(features, skip, bool(interpolate), told)

    def _encode(
        self, pixel_values: torch.Tensor, reading: Reading, output_attentions: bool = False
    ) -> tuple[torch.Tensor, tuple | None]:
        read = reading.features
        several = read is not None and len(read) > 1
        encoded = self.vision_tower(
            pixel_values,
            output_hidden_states=several,
            output_attentions=output_attentions,
            final_norm=read is None,
            depth=None if read is None else max(read),
            interpolate_pos_encoding=reading.interpolate,
        )
        features = (
            torch.cat([encoded.hidden_states[state] for state in read], -1)
            if several
            else encoded.last_hidden_state
        )
        if reading.skip_first:
            features = features[:, 1:]
        if self.spec.pooling is not None:
            features = self.image_pooling(features)
        return self.multi_modal_projector(features), encoded.attentions

    def _encode_tiles(
        self,
        pixel_values: torch.Tensor,
        aspect_ratio_ids: torch.Tensor | None,
        aspect_ratio_mask: torch.Tensor | None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, tuple | None]:
        encoded = self.vision_tower(
            pixel_values,
            aspect_ratio_ids,
            aspect_ratio_mask,
            reference=self.reference,
            output_attentions=output_attentions,
        )
        return self.multi_modal_projector(encoded.last_hidden_state).flatten(
            1, 3
        ), encoded.attentions

    def find_placeholders(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        pictures: int = 0,
        per_picture: int | None = None,
    ) -> torch.Tensor:
        """Where picture placeholders stand: bool [B, T].

        With `config.image_token_index` these are the positions that hold it. Without, where
        pictures are merged, the id is told by `fusion.merge.find_placeholder` from the runs it
        stands in at unmasked positions; where none stands so, no position is one.

        Args:
            input_ids: int [B, T].
            attention_mask: [B, T], zero where padded, or None.
            pictures: how many pictures the batch has.
            per_picture: placeholders of each; by default the features of a picture of the config's
                size.

        Raises:
            ValueError: the id is not set, and more than one could be it.
        """
        if self.spec.fusion is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        token = self.config.image_token_index
        if token is not None:
            return input_ids == token
        if pictures and self.spec.fusion == "merge":
            token = find_placeholder(
                input_ids, attention_mask, per_picture or self.spec.tokens_per_image, pictures
            )
        if token is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return (
            input_ids == token
            if attention_mask is None
            else (input_ids == token) & (attention_mask != 0)
        )

    def _merge(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        given: tuple[torch.Tensor | None, torch.Tensor | None, Reading],
        filled: bool,
        held: int,
        output_attentions: bool,
        told: int | None,
    ) -> Seen:
        """Embeddings with picture features in the placeholders' places, or before a text that has
        none.

        `given` are pixels or features and how to read them; ids after the first `told` are text.
        """
        pixel_values, image_features, reading = given
        pictures, per_picture = self._count_pictures(pixel_values, image_features, reading)
        if input_ids is None:
            if not pictures:
                return Seen(inputs_embeds)
            input_ids = self._ids_of(inputs_embeds)
        placeholders = attentions = None
        if self.spec.fusion is not None and (pictures or not filled):
            mask = None if attention_mask is None else attention_mask[:, -input_ids.shape[1] :]
            if told is not None and told < input_ids.shape[1]:
                mask = None if mask is None else mask[:, :told]
                placeholders = self._placeholders(
                    input_ids[:, :told], mask, pictures, filled, per_picture
                )
                placeholders = (
                    placeholders
                    if placeholders is None
                    else pad(placeholders, (0, input_ids.shape[1] - told))
                )
            else:
                placeholders = self._placeholders(input_ids, mask, pictures, filled, per_picture)
        if placeholders is None and (filled or self.spec.fusion != "prepend"):
            self._check_held(held, pictures, input_ids.shape[0])
            pixel_values = image_features = None
        elif pixel_values is not None:
            image_features, attentions = self._encode(pixel_values, reading, output_attentions)
        if inputs_embeds is None:
            inputs_embeds = self._embed(input_ids, placeholders)
        if image_features is None:
            return Seen(inputs_embeds, placeholders)
        if placeholders is not None:
            return Seen(
                merge(inputs_embeds, placeholders, image_features),
                placeholders,
                image_features,
                attentions,
            )
        visual = share_out(image_features, inputs_embeds.shape[0]).to(inputs_embeds)
        return Seen(
            torch.cat([visual, inputs_embeds], dim=1),
            None,
            image_features,
            attentions,
            before_text=visual.shape[1],
        )

    def _check_held(self, held: int, pictures: int, rows: int) -> None:
        """Pictures given again, of a text that has no place for them, must be those before the text
        in the cache.
        """
        again = pictures * self.spec.tokens_per_image
        if (
            again
            and again != held * rows
            and (held or (self.spec.fusion == "prepend" and self.config.image_token_index is None))
        ):
            raise ValueError(
                f"pictures must stand before the text: cache holds text, and {held} visual tokens before it"
            )

    def _attend(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        aspects: tuple[torch.Tensor | None, torch.Tensor | None],
        cross_attention_mask: torch.Tensor | None,
        cache: TransformersCache | None,
        output_attentions: bool,
    ) -> Seen:
        """Embeddings, and what the cross-attention layers need: nothing where there are no
        pictures, here or in the cache.
        """
        placeholders = attentions = None
        if inputs_embeds is None:
            placeholders = self.find_placeholders(input_ids)
            inputs_embeds = self._embed(input_ids)
        text, rows = self.spec.text, inputs_embeds.shape[0]
        if placeholders is None and isinstance(cross_attention_mask, torch.Tensor):
            given, length = cross_attention_mask.shape[1], inputs_embeds.shape[1]
            if 0 < given < length:  # whether the first or the last have none, nothing says
                raise ValueError(
                    f"cross_attention_mask must have a row for each of {length} inputs_embeds, got {given}"
                )
        if self.spec.encoder == "tiled":
            tokens, filled = self.vision_tower.tokens_per_tile, aspects[1]
            if pixel_values is not None:
                self.vision_tower.check(pixel_values, *aspects)
                if pixel_values.shape[0] != rows:
                    raise ValueError(
                        f"pixel_values must have {rows} rows, one per row of text, got {pixel_values.shape[0]}"
                    )
                image_features, attentions = self._encode_tiles(
                    pixel_values, *aspects, output_attentions
                )
            elif image_features is not None:
                check_tile_features(image_features, rows, tokens, text.hidden_size)
            states = image_features
        else:
            tokens, filled = self.spec.tokens_per_image, None
            reading = self._reading(None, None, None)
            self._count_pictures(pixel_values, image_features, reading)
            if pixel_values is not None:
                image_features, attentions = self._encode(pixel_values, reading, output_attentions)
            states = None if image_features is None else share_out(image_features, rows)
        if states is not None:
            states = states.to(inputs_embeds.dtype)
        past = 0 if cache is None else cache.length
        mask = rows_of_mask(cross_attention_mask, inputs_embeds.shape[:2], past)
        if cross_attention_mask is not None and placeholders is not None and states is not None:
            check_blind(cross_attention_mask, placeholders)
        held = None if cache is None else cache.tile_mask
        cross = cross_context(states, mask, tokens, self.reference, held=held, filled=filled)
        if cache is not None and cross is not None:
            cache.tile_mask = cross.kept
        return Seen(inputs_embeds, placeholders, image_features, attentions, cross)

    def _count_pictures(
        self,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        reading: Reading | None = None,
    ) -> tuple[int, int]:
        """How many pictures there are, and features of each."""
        reading = reading or self._reading(None, None, None)
        own = self.spec.tokens_per_image
        if pixel_values is not None:
            self.vision_tower.check(pixel_values, reading.interpolate)
            per_picture = (
                own
                if self.spec.pooling
                else self.vision_tower.count_features(pixel_values) - int(reading.skip_first)
            )
            return pixel_values.shape[0], per_picture
        if image_features is None:
            return 0, own
        if not isinstance(image_features, torch.Tensor):
            raise TypeError(
                f"image_features must be a torch.Tensor, got {type(image_features).__name__}"
            )
        if reading.told:
            raise ValueError(
                "image_features are encoded already: give vision_feature_layer, vision_feature_select_strategy and "
                "interpolate_pos_encoding to get_image_features"
            )
        wanted = [own, self.spec.text.hidden_size]
        if (
            self.spec.fusion == "merge" and image_features.dim() == 3
        ):  # there may be others by size or strategy
            wanted[0] = image_features.shape[1]
        if list(image_features.shape[1:]) != wanted or not wanted[0]:
            raise ValueError(
                f"image_features must be [pictures, {own}, {wanted[1]}], got {list(image_features.shape)}"
            )
        return image_features.shape[0], wanted[0]

    def _ids_of(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """int64 [B, T], the placeholder's id where an embedding is its embedding, and another
        elsewhere.

        Raises:
            ValueError: the config does not say the placeholder's id, or it has no embedding.
        """
        check_embeddings(inputs_embeds, self.spec.text.hidden_size)
        if (
            self.spec.fusion == "prepend" and self.config.image_token_index is None
        ):  # no position is one
            return inputs_embeds.new_zeros(inputs_embeds.shape[:2], dtype=torch.long)
        token, rows = self.config.image_token_index, self.get_input_embeddings().weight.shape[0]
        if token is None or token >= rows:
            raise ValueError(
                f"pictures beside inputs_embeds need an image_token_index with an embedding (0 to {rows - 1}), whose places they take; "
                f"got {token!r}"
            )
        places = (
            inputs_embeds
            == self.get_input_embeddings()(torch.tensor(token, device=inputs_embeds.device))
        ).all(-1)
        return torch.where(places, token, token - 1 if token else 1)

    def _placeholders(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        pictures: int,
        filled: bool = False,
        per_picture: int | None = None,
    ) -> torch.Tensor | None:
        """bool [B, T] with as many True as there are features; None where the text has no place for
        them: a filled cache already holds the pictures given again, or they stand before it."""
        if self.spec.fusion == "prepend" and self.config.image_token_index is None:
            return None
        if attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        per_picture = per_picture or self.spec.tokens_per_image
        placeholders = self.find_placeholders(input_ids, attention_mask, pictures, per_picture)
        if torch.compiler.is_compiling() and self.spec.fusion == "merge":
            return placeholders
        rows = placeholders.sum(1).tolist()
        found = sum(rows)
        if not found and (filled or self.spec.fusion == "prepend"):
            return None
        if found != pictures * per_picture:
            unexpanded = (
                "; expand each <image> with the processor (MllamaImageProcessor)"
                if found <= pictures
                else ""
            )
            raise ValueError(
                f"input_ids hold {found} picture placeholders, but {pictures} pictures give {pictures * per_picture} features{unexpanded}"
            )
        if any(row % per_picture for row in rows):
            raise ValueError(
                f"every row must hold a multiple of {per_picture} picture placeholders, got {rows}"
            )
        return placeholders

    def _embed(
        self, input_ids: torch.Tensor, placeholders: torch.Tensor | None = None
    ) -> torch.Tensor:
        """[B, T, hidden]: looked-up ids. Placeholders, which may lie outside the vocabulary, are
        not.
        """
        if placeholders is not None:
            input_ids = input_ids.masked_fill(placeholders, 0)
        check_range(input_ids, self.get_input_embeddings().weight.shape[0])
        return self.get_input_embeddings()(input_ids)
