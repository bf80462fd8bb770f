"""The interface of fusions: inputs, outputs, and the fusion of a model without images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from mllama.config.features import FeatureChoice, choose_features
from mllama.config.spec import ModelSpec


@dataclass
class ModelInputs:
    """Arguments of one forward pass of `mllama.model.VisionLanguageModel`.

    Attributes:
        input_ids: int [B, T]; exclusive with inputs_embeds.
        inputs_embeds: [B, T, hidden].
        attention_mask: [B, past + T], zero where padded, or 4-D as `text.decoder.Decoder` takes it.
        position_ids: int [B or 1, T].
        first_key: int64 [B or 1, T], start of each position's sequence in packed rows.
        token_type_ids: int [B, T], 0 for a bidirectional prompt, then 1; exclusive with
            prefix_length.
        prefix_length: int64 [B], the prompt's length.
        cache: see `mllama.nn.cache.Cache`.
        pixel_values, aspect_ratio_ids, aspect_ratio_mask: as the encoder takes them; exclusive
            with image_features.
        image_features: output of `encode_images`.
        cross_attention_mask: [B, T or past + T, images, tiles].
        choice: states of the encoder to read. Default: the spec's.
        text_start: ids from this position on are text, never placeholders. Default: placeholders
            may be anywhere.
        labels: int [B, T], shifted inside.
        num_items_in_batch: divides the sum of the loss.
        logits_to_keep: number of last positions to compute logits for (0: all), or their indices.
            Default: no logits; a loss is then computed without all of them in memory.
        output_attentions, output_hidden_states: return these too.
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
        """Positions in the cache before this pass. Synchronizes if the cache is static."""
        return 0 if self.cache is None else int(self.cache.length)


@dataclass
class DecoderInputs:
    """What a fusion returns for the decoder.

    Attributes:
        embeds: [B, T, hidden], or [B, num_prefix_tokens + T, hidden].
        padding_mask, position_ids, first_key, labels: as in `ModelInputs`, for all positions.
        placeholders: bool [B, T], positions where features were written.
        features: the image features, encoded or given.
        attentions: the encoder's attentions.
        cross: context of the cross-attention layers.
        num_prefix_tokens: number of visual tokens newly prepended to the text.
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
    """Parts of the model that a fusion uses.

    Attributes:
        embedding: the decoder's embedding.
        encoder: the image encoder, or None.
        encode: encodes and projects the images of `ModelInputs`; returns (features, attentions).
        reference: which Llama-3.2-Vision is followed, "meta" or "hf".
    """

    embedding: nn.Module
    encoder: nn.Module | None
    encode: Callable[[ModelInputs], tuple[torch.Tensor, tuple | None]]
    reference: str = "meta"


class Fusion:
    """The fusion of a model without images, and the base class of the others."""

    chunk_obstacle: str | None = None  # reason why a prompt cannot be prefilled in chunks

    def __init__(self, spec: ModelSpec):
        self.spec = spec

    @property
    def placeholders_per_image(self) -> int:
        """Placeholder ids that an image needs in the text."""
        return 0

    def prepare(
        self, inputs: ModelInputs, padding_mask: torch.Tensor | None, parts: Parts
    ) -> DecoderInputs:
        """Embed the text and add the images.

        Raises:
            TypeError, ValueError: invalid images, or another number than the text has places for.
            IndexError: an id outside the vocabulary.
        """
        if inputs.pixel_values is not None or inputs.image_features is not None:
            raise ValueError("pixel_values and image_features must be None for a text model")
        embeds = inputs.inputs_embeds
        if embeds is None:
            embeds = embed(inputs.input_ids, parts.embedding)
        return self.pass_on(inputs, padding_mask, embeds)

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
        """bool [B, T]: positions of `spec.image_token_index`; all False if it is None. The other
        arguments serve fusions that find the id by its runs.
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
        """Number of images in each row, for features [images, patches, hidden] in row order."""
        rows = len(input_ids if inputs_embeds is None else inputs_embeds)  # type: ignore[arg-type]
        return [share_evenly(len(features), rows)] * rows

    def extra_cache_tokens(self, images: int, rows: int) -> int:
        """Cached positions per row beyond its ids."""
        return 0

    def stands_before_text(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None, images: int
    ) -> bool:
        """Whether visual tokens would be prepended to this text."""
        return False


def share_evenly(images: int, rows: int) -> int:
    """Images per row, if every row has the same number.

    Raises:
        ValueError: images is not a multiple of rows.
    """
    if rows == 0 or images % rows:
        raise ValueError(
            f"images without placeholders must be as many for every row, got {images} for "
            f"{rows} rows"
        )
    return images // rows


def vocabulary(embedding: nn.Module) -> int:
    """Rows of an embedding. PEFT's adapters around one have its weight alone, a packed one has
    none.
    """
    rows = getattr(embedding, "num_embeddings", None)
    return embedding.weight.shape[0] if rows is None else rows


def embed(
    input_ids: torch.Tensor, embedding: nn.Module, placeholders: torch.Tensor | None = None
) -> torch.Tensor:
    """Embed ids: [B, T] -> [B, T, hidden]. Placeholders may lie outside the vocabulary.

    Raises:
        IndexError: an id lies outside the embedding matrix (instead of a device-side assertion).
    """
    if placeholders is not None:
        input_ids = input_ids.masked_fill(placeholders, 0)
    checkable = not (torch.compiler.is_compiling() or input_ids.is_meta) and input_ids.numel()
    if checkable:
        rows = vocabulary(embedding)
        low, high = _range(input_ids)
        if low < 0 or high >= rows:
            raise IndexError(
                f"input_ids must lie within the vocabulary (0 to {rows - 1}), got {low} to {high}"
            )
    return embedding(input_ids)


def _range(ids: torch.Tensor) -> tuple[int, int]:
    """Lowest and highest id, with one synchronization; of few ids, as a decoding step has, on the
    host.
    """
    if ids.numel() > 16:
        low, high = torch.stack(ids.aminmax()).tolist()
        return low, high
    values = ids.flatten().tolist()
    return min(values), max(values)


def count_images(
    inputs: ModelInputs, spec: ModelSpec, encoder: nn.Module, any_count: bool = False
) -> tuple[int, int]:
    """(number of images, features per image); `any_count` accepts any number of features.

    Raises:
        TypeError, ValueError: pixels or features have the wrong type or shape.
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
            "image_features are already encoded: pass vision_feature_layer, "
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
