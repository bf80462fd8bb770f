"""How features of images reach the decoder: what a fusion is given, what it gives, and the fusion
of a model without images.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from mllama.config.features import FeatureChoice, choose_features
from mllama.config.spec import ModelSpec
from mllama.nn.cache import Cache


@dataclass
class ModelInputs:
    """Arguments of one forward pass of `mllama.model.VisionLanguageModel`.

    Attributes:
        input_ids: int [B, T]; or give
        inputs_embeds: [B, T, hidden].
        attention_mask: [B, past + T], zero where padded, or 4-D as `text.decoder.Decoder` takes it.
        position_ids: int [B or 1, T].
        first_key: int64 [B or 1, T], where the sequence of each position of packed rows begins.
        token_type_ids: int [B, T], 0 for a bidirectional prompt, then 1; or give
        prefix_length: int64 [B], the prompt's length.
        cache: see `mllama.nn.cache.Cache`.
        pixel_values, aspect_ratio_ids, aspect_ratio_mask: as the encoder takes them; or give
        image_features: what `encode_images` gave.
        cross_attention_mask: [B, T or past + T, images, tiles].
        choice: which states of the encoder are read; None is the spec's.
        text_start: ids from this one on are text, whatever they are. None: placeholders may stand
            anywhere.
        labels: int [B, T], shifted inside.
        num_items_in_batch: divides the sum of the loss.
        logits_to_keep: the last positions to compute logits of (0: all), or which ones; None: no
            logits.
        output_attentions, output_hidden_states: return them too.
    """

    input_ids: torch.Tensor | None = None
    inputs_embeds: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    first_key: torch.Tensor | None = None
    token_type_ids: torch.Tensor | None = None
    prefix_length: torch.Tensor | None = None
    cache: Any = None
    pixel_values: torch.Tensor | None = None
    image_features: torch.Tensor | None = None
    aspect_ratio_ids: torch.Tensor | None = None
    aspect_ratio_mask: torch.Tensor | None = None
    cross_attention_mask: torch.Tensor | None = None
    choice: FeatureChoice | None = None
    text_start: int | None = None
    labels: torch.Tensor | None = None
    num_items_in_batch: int | torch.Tensor | None = None
    logits_to_keep: int | torch.Tensor | None = 0
    output_attentions: bool = False
    output_hidden_states: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(B, T)."""
        given = self.inputs_embeds if self.input_ids is None else self.input_ids
        return given.shape[0], given.shape[1]  # type: ignore[union-attr]

    @property
    def past(self) -> int:
        """Positions in the cache before the pass; reading a static cache's synchronizes."""
        return 0 if self.cache is None else int(self.cache.length)


@dataclass
class DecoderInputs:
    """What the decoder starts from.

    Attributes:
        embeds: [B, T, hidden], or [B, num_prefix_tokens + T, hidden].
        padding_mask, position_ids, first_key, labels: as in `ModelInputs`, of all positions.
        placeholders: bool [B, T], where features were written.
        features: what was encoded or given.
        attentions: the encoder's.
        cross: for the cross-attention layers.
        num_prefix_tokens: new visual tokens before the text.
    """

    embeds: torch.Tensor
    padding_mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None
    first_key: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    placeholders: torch.Tensor | None = None
    features: torch.Tensor | None = None
    attentions: tuple | None = None
    cross: Any = None
    num_prefix_tokens: int = 0


class Parts(NamedTuple):
    """What a fusion uses of the model around it.

    Attributes:
        embedding: the decoder's.
        encoder: the image encoder, or None.
        encode: encodes and projects the images of `ModelInputs`: (features, attentions).
        reference: whose Llama-3.2-Vision is followed.
    """

    embedding: nn.Module
    encoder: nn.Module | None
    encode: Callable[[ModelInputs], tuple[torch.Tensor, tuple | None]]
    reference: str = "meta"


class Fusion:
    """The fusion of a model without images, and what all have in common."""

    chunk_obstacle: str | None = None  # why a prompt cannot be prefilled in chunks

    def __init__(self, spec: ModelSpec):
        self.spec = spec

    @property
    def placeholders_per_image(self) -> int:
        """How many ids of a text an image has, where it must have some."""
        return 0

    def prepare(
        self, inputs: ModelInputs, padding_mask: torch.Tensor | None, parts: Parts
    ) -> DecoderInputs:
        """Embed the text and bring images into it.

        Raises:
            TypeError, ValueError: images of another kind or number than the text has places for.
            IndexError: an id outside the vocabulary.
        """
        if inputs.pixel_values is not None or inputs.image_features is not None:
            raise ValueError("pixel_values and image_features must be None: the model takes text")
        embeds = inputs.inputs_embeds
        if embeds is None:
            embeds = embed(inputs.input_ids, parts.embedding)
        return self.pass_on(inputs, padding_mask, embeds)

    def decode_context(
        self, rows: tuple[int, int], mask: torch.Tensor | None, cache: Cache, parts: Parts
    ) -> Any:
        """What layers that attend to images are told in a pass without new images; None without
        such layers, or images.

        Args:
            rows: batch and new tokens.
            mask: the cross-attention mask, or None.
            cache: with what came before.
            parts: of the model.
        """
        return None

    def pass_on(
        self, inputs: ModelInputs, padding_mask: torch.Tensor | None, embeds: torch.Tensor, **more
    ) -> DecoderInputs:
        """`DecoderInputs` with the text's own masks, positions and labels."""
        return DecoderInputs(
            embeds, padding_mask, inputs.position_ids, inputs.first_key, inputs.labels, **more
        )

    def find_placeholders(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        images: int = 0,
        per_image: int | None = None,
    ) -> torch.Tensor:
        """bool [B, T]: where `spec.image_token_index` stands, nowhere without one. The further
        arguments are for fusions that can find the id by its runs.
        """
        token = self.spec.image_token_index
        if token is None:
            return torch.zeros_like(input_ids, dtype=torch.bool)
        return input_ids == token

    def images_per_row(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: torch.Tensor | None,
        features: torch.Tensor,
        embedding: nn.Module,
    ) -> list[int]:
        """How many of the images, [images, patches, hidden] in row order, belong to each row."""
        rows = len(input_ids if inputs_embeds is None else inputs_embeds)  # type: ignore[arg-type]
        return [share_evenly(len(features), rows)] * rows

    def extra_cache_tokens(self, images: int, rows: int) -> int:
        """Positions of a row in the cache that its ids do not have."""
        return 0

    def stands_before_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, images: int
    ) -> bool:
        """Whether visual tokens would be put before this text."""
        return False


def share_evenly(images: int, rows: int) -> int:
    """How many of the images every row has.

    Raises:
        ValueError: they cannot be shared out evenly.
    """
    if rows == 0 or images % rows:
        raise ValueError(
            f"images without placeholders must be as many for every row, got {images} for "
            f"{rows} rows"
        )
    return images // rows


def embed(
    input_ids: torch.Tensor, embedding: nn.Module, placeholders: torch.Tensor | None = None
) -> torch.Tensor:
    """[B, T, hidden]: looked-up ids. Placeholders, which may lie outside the vocabulary, are not.

    Raises:
        IndexError: an id outside the embedding matrix, instead of a device-side assertion.
    """
    if placeholders is not None:
        input_ids = input_ids.masked_fill(placeholders, 0)
    checkable = not (torch.compiler.is_compiling() or input_ids.is_meta) and input_ids.numel()
    if checkable:
        rows = embedding.num_embeddings
        low, high = torch.stack(input_ids.aminmax()).tolist()  # one synchronization
        if low < 0 or high >= rows:
            raise IndexError(
                f"input_ids must lie within the vocabulary (0 to {rows - 1}), got {low} to {high}"
            )
    return embedding(input_ids)


def count_images(
    inputs: ModelInputs, spec: ModelSpec, encoder: nn.Module, any_count: bool = False
) -> tuple[int, int]:
    """How many images there are, and features of each: with `any_count` as many as are given.

    Raises:
        TypeError, ValueError: pixels or features of another kind or shape.
    """
    choice = inputs.choice or choose_features(spec)
    own, features = spec.tokens_per_image, inputs.image_features
    if inputs.pixel_values is not None:
        encoder.check(inputs.pixel_values, choice.interpolate)
        per_image = own
        if not spec.pooling:
            per_image = encoder.count_features(inputs.pixel_values) - int(choice.skip_first)
        return inputs.pixel_values.shape[0], per_image
    if features is None:
        return 0, own
    if not isinstance(features, torch.Tensor):
        raise TypeError(f"image_features must be a torch.Tensor, got {type(features).__name__}")
    if choice.explicit:
        raise ValueError(
            "image_features are encoded already: give vision_feature_layer, "
            "vision_feature_select_strategy and interpolate_pos_encoding to get_image_features"
        )
    wanted = [own, spec.text.hidden_size]
    if any_count and features.dim() == 3:
        wanted[0] = features.shape[1]
    if list(features.shape[1:]) != wanted or not wanted[0]:
        raise ValueError(
            f"image_features must be [images, {own}, {wanted[1]}], got {list(features.shape)}"
        )
    return features.shape[0], wanted[0]
