"""Early fusion: image features replace the embeddings of placeholders."""

import torch
from torch import nn
from torch.nn.functional import pad

from mllama.fusion.base import (
    DecoderInputs,
    Fusion,
    ModelInputs,
    Parts,
    count_images,
    embed,
    vocabulary,
)


def find_placeholder(
    input_ids: torch.Tensor, attention_mask: torch.Tensor | None, per_image: int, images: int
) -> int | None:
    """Find the id of the image placeholder by its runs: `per_image` times in a row per image.

    A candidate is an id whose runs at unmasked positions all have lengths that are multiples of
    `per_image`. Among several candidates the number of occurrences must be `images * per_image`.

    Args:
        input_ids: int [B, T].
        attention_mask: [B, T], zero where padded, or None.
        per_image: placeholders per image.
        images: number of images in the batch.

    Returns:
        The id, or None if there is no candidate.

    Raises:
        ValueError: several ids qualify.
    """
    visible = (
        torch.ones_like(input_ids, dtype=torch.bool)
        if attention_mask is None
        else attention_mask.bool()
    )
    # All rows concatenated, each closed by a marker, so that no run crosses rows or padding.
    marker = input_ids.min() - 1
    ids = torch.nn.functional.pad(
        input_ids.masked_fill(~visible, marker), (0, 1), value=int(marker)
    ).flatten()
    values, lengths = torch.unique_consecutive(ids, return_counts=True)
    broken = values[lengths % per_image != 0]
    candidates = values[~torch.isin(values, broken) & (values != marker)].unique()
    if len(candidates) > 1:
        counts = torch.stack([(ids == candidate).sum() for candidate in candidates])
        candidates = candidates[counts == images * per_image]
        if len(candidates) != 1:
            raise ValueError(
                "image_token_index is not set and cannot be inferred from input_ids: "
                f"{len(candidates) or 'no'} ids have runs of {per_image} for {images} images; "
                "set config.image_token_index"
            )
    return int(candidates[0]) if len(candidates) else None


def merge(
    inputs_embeds: torch.Tensor, placeholders: torch.Tensor, image_features: torch.Tensor
) -> torch.Tensor:
    """Write image features at the placeholders, in row order.

    Args:
        inputs_embeds: [B, T, hidden].
        placeholders: bool [B, T], with one True per feature.
        image_features: [images, patches, hidden].

    Returns:
        [B, T, hidden], a new tensor in inputs_embeds' dtype.
    """
    return inputs_embeds.masked_scatter(
        placeholders.unsqueeze(-1), image_features.to(inputs_embeds.device, inputs_embeds.dtype)
    )


class MergeFusion(Fusion):
    """Features replace the placeholders in the text."""

    optional = False  # whether placeholders may be absent
    any_feature_count = True  # other image sizes and strategies give other numbers of features

    def prepare(
        self, inputs: ModelInputs, padding_mask: torch.Tensor | None, parts: Parts
    ) -> DecoderInputs:
        images, per_image = count_images(inputs, self.spec, parts.encoder, self.any_feature_count)
        ids, embeds = inputs.input_ids, inputs.inputs_embeds
        if ids is None:
            if not images:
                return self.pass_on(inputs, padding_mask, embeds)
            ids = self.ids_of(embeds, parts.embedding)
        placeholders = None
        if images or not inputs.past:
            placeholders = self._locate(ids, padding_mask, inputs, images, per_image)
        features, attentions = self._features(inputs, placeholders, images, parts)
        if embeds is None:
            embeds = embed(ids, parts.embedding, placeholders)
        if features is None:
            return self.pass_on(inputs, padding_mask, embeds, placeholders=placeholders)
        return self.join(inputs, padding_mask, embeds, placeholders, features, attentions)

    @property
    def placeholders_per_image(self) -> int:
        return 0 if self.optional else self.spec.tokens_per_image

    def join(self, inputs, padding_mask, embeds, placeholders, features, attentions):
        """`DecoderInputs` with the features at their placeholders."""
        return self.pass_on(
            inputs,
            padding_mask,
            merge(embeds, placeholders, features),
            placeholders=placeholders,
            features=features,
            attentions=attentions,
        )

    def _features(
        self, inputs: ModelInputs, placeholders: torch.Tensor | None, images: int, parts: Parts
    ) -> tuple[torch.Tensor | None, tuple | None]:
        """Features and attentions of new images; none for images that the cache already has."""
        if placeholders is None and not self.may_stand_before(inputs, images):
            return None, None
        if inputs.pixel_values is None:
            return inputs.image_features, None
        return parts.encode(inputs)

    def may_stand_before(self, inputs: ModelInputs, images: int) -> bool:
        """Whether images of a text without placeholders are prepended."""
        return False

    def _locate(
        self,
        ids: torch.Tensor,
        padding_mask: torch.Tensor | None,
        inputs: ModelInputs,
        images: int,
        per_image: int,
    ) -> torch.Tensor | None:
        """`locate` among the new ids; ids from `text_start` on are text."""
        length = ids.shape[1]
        mask = None if padding_mask is None else padding_mask[:, -length:]
        start = inputs.text_start
        if start is None or start >= length:
            return self.locate(ids, mask, images, bool(inputs.past), per_image)
        mask = None if mask is None else mask[:, :start]
        found = self.locate(ids[:, :start], mask, images, bool(inputs.past), per_image)
        return None if found is None else pad(found, (0, length - start))

    def locate(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        images: int,
        continuing: bool = False,
        per_image: int | None = None,
    ) -> torch.Tensor | None:
        """Locate the placeholders: bool [B, T] with one True per feature. None if there are none:
        with `continuing`, the cache already has the images.

        Raises:
            ValueError: the numbers of placeholders and features differ, or an image crosses rows.
        """
        if attention_mask is not None:
            attention_mask = attention_mask[:, -input_ids.shape[1] :]
        per_image = per_image or self.spec.tokens_per_image
        placeholders = self.find_placeholders(input_ids, attention_mask, images, per_image)
        if torch.compiler.is_compiling() and not self.optional:
            return placeholders
        rows = placeholders.sum(1).tolist()
        found = sum(rows)
        if not found and (continuing or self.optional):
            return None
        if found != images * per_image:
            hint = "; expand each <image> with the processor" if found <= images else ""
            raise ValueError(
                f"input_ids have {found} image placeholders, but {images} images give "
                f"{images * per_image} features{hint}"
            )
        if any(row % per_image for row in rows):
            raise ValueError(
                f"every row must have a multiple of {per_image} image placeholders, got {rows}"
            )
        return placeholders

    def find_placeholders(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        images: int = 0,
        per_image: int | None = None,
    ) -> torch.Tensor:
        """Positions of image placeholders: bool [B, T].

        These are the positions of `spec.image_token_index`. If it is None, `find_placeholder`
        infers the id from its runs at unmasked positions.

        Args:
            input_ids: int [B, T].
            attention_mask: [B, T], zero where padded, or None.
            images: number of images in the batch.
            per_image: placeholders per image. Default: those of an image of the spec's size.

        Raises:
            ValueError: the id is not set and several ids qualify.
        """
        token = None
        if self.spec.image_token_index is None and images and not self.optional:
            wanted = per_image or self.spec.tokens_per_image
            token = find_placeholder(input_ids, attention_mask, wanted, images)
        if token is None:
            return super().find_placeholders(input_ids)
        found = input_ids == token
        return found if attention_mask is None else found & (attention_mask != 0)

    def ids_of(self, inputs_embeds: torch.Tensor, embedding: nn.Module) -> torch.Tensor:
        """int64 [B, T]: the placeholder's id where an embedding equals its own, else another id.

        Raises:
            ValueError: the placeholder has no embedding.
        """
        token, rows = self.spec.image_token_index, vocabulary(embedding)
        if token is None or token >= rows:
            raise ValueError(
                "images with inputs_embeds need an image_token_index that has an embedding "
                f"(0 to {rows - 1}), to mark their places; got {token!r}"
            )
        vector = embedding(torch.tensor(token, device=inputs_embeds.device))
        places = (inputs_embeds == vector).all(-1)
        return torch.where(places, token, token - 1 if token else 1)

    def images_per_row(self, input_ids, inputs_embeds, attention_mask, features, embedding):
        if inputs_embeds is not None:
            input_ids = self.ids_of(inputs_embeds, embedding)
        per_image = features.shape[1]
        placeholders = self.locate(input_ids, attention_mask, len(features), per_image=per_image)
        if placeholders is None:
            given = input_ids if inputs_embeds is None else inputs_embeds
            return super().images_per_row(given, None, None, features, embedding)
        return (placeholders.sum(1) // per_image).tolist()
