"""How the images of a batch's rows are laid out, one class for each fusion."""

from collections.abc import Sequence

import torch

from mllama.config.spec import ModelSpec
from mllama.data.encoded import EncodedRow

Tensors = dict[str, torch.Tensor]


class ImageLayout:
    """Images whose features replace placeholders, one after the other; and the base class of the
    others.

    Args:
        spec: the model's spec.
        reference: the model's `reference`.
    """

    def __init__(self, spec: ModelSpec, reference: str):
        self.spec, self.reference = spec, reference
        self.bidirectional = spec.bidirectional_prefix

    def check_packing(self) -> None:
        """Raise ValueError if packed rows would see one another."""

    def check_images(self, count: int) -> None:
        """Raise ValueError if a row cannot have so many images."""

    def tokens_before(self, row: EncodedRow) -> int:
        """Positions that images take before the text."""
        return 0

    def split(self, images: Tensors) -> Tensors:
        """The image inputs of a batch of one row as those of the row."""
        return images

    def join(self, rows: Sequence[Sequence[EncodedRow]], length: int, packed: bool) -> Tensors:
        """The image inputs of a batch.

        Args:
            rows: the examples of each row.
            length: tokens per row, padded.
            packed: whether rows are packed.
        """
        pixels = [one.images["pixel_values"] for row in rows for one in row if one.images]
        return {"pixel_values": torch.cat(pixels)} if pixels else {}


class NoImages(ImageLayout):
    """A model of text."""

    def check_images(self, count: int) -> None:
        if count:
            raise ValueError(f"the model takes no images, and the row has {count}")


class Prepended(ImageLayout):
    """Images before the text, as many in every row; or at placeholders."""

    def check_packing(self) -> None:
        raise ValueError(
            'pack=True is not supported with fusion="prepend": images stand before the row'
        )

    def tokens_before(self, row: EncodedRow) -> int:
        token = self.spec.image_token_index
        if token is not None and (row.input_ids == token).any():
            return 0
        return row.num_images * self.spec.tokens_per_image

    def join(self, rows: Sequence[Sequence[EncodedRow]], length: int, packed: bool) -> Tensors:
        examples = [one for (one,) in rows]
        before = [one for one in examples if self.tokens_before(one)]
        for one in examples if before else ():
            first = before[0]
            if self.tokens_before(one) != self.tokens_before(first):
                raise ValueError(
                    'with fusion="prepend" all rows of a batch must have as many images: '
                    f"{first.where} has {first.num_images}, {one.where} has {one.num_images}; use "
                    "a batch size of 1"
                )
        return super().join(rows, length, packed)


class Crossed(ImageLayout):
    """Images that cross-attention layers read, padded to as many in every row, and hidden by the
    mask from the texts of other examples.
    """

    def check_packing(self) -> None:
        if self.reference != "meta":
            raise ValueError(
                'packed rows, and unequal numbers of images, need reference="meta": with "hf" text '
                "without an image attends to all images of its row"
            )

    def join(self, rows: Sequence[Sequence[EncodedRow]], length: int, packed: bool) -> Tensors:
        counts = [sum(one.num_images for one in row) for row in rows]
        uneven = len(set(counts)) > 1
        if not any(counts):
            return {}
        joined = {"pixel_values": _filled(rows, "pixel_values", max(counts)).flatten(0, 1)}
        if packed or uneven:
            self.check_packing()
            joined["cross_attention_mask"] = self._mask(rows, length, max(counts))
        return joined

    def _mask(
        self, rows: Sequence[Sequence[EncodedRow]], length: int, images: int, tiles: int = 1
    ) -> torch.Tensor:
        """int64 [rows, length, images, tiles]: 1 where a tile is visible."""
        mask = torch.zeros(len(rows), length, images, tiles, dtype=torch.int64, device="cpu")
        for number, row in enumerate(rows):
            start = image = 0
            for one in row:
                end, last = start + len(one), image + one.num_images
                if one.images:
                    mask[number, start:end, image:last] = self._shown(one)
                start, image = end, last
        return mask

    def _shown(self, one: EncodedRow) -> torch.Tensor | int:
        """What an example's tokens see of its images; all of them, as without a mask."""
        return 1


class Tiled(Crossed):
    """Crossed images in tiles."""

    def split(self, images: Tensors) -> Tensors:
        return {name: value[0] for name, value in images.items()}

    def join(self, rows: Sequence[Sequence[EncodedRow]], length: int, packed: bool) -> Tensors:
        most = max(sum(one.num_images for one in row) for row in rows)
        if not most:
            return {}
        joined = {
            name: _filled(rows, name, most)
            for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
        }
        joined["aspect_ratio_mask"][..., 0] = 1  # also where there is no image, as processors do
        tiles = joined["aspect_ratio_mask"].shape[-1]
        return joined | {"cross_attention_mask": self._mask(rows, length, most, tiles)}

    def _shown(self, one: EncodedRow) -> torch.Tensor:
        return one.images["cross_attention_mask"]


_LAYOUTS = {
    None: NoImages,
    "merge": ImageLayout,
    "prepend": Prepended,
    "cross_attention": Crossed,
    "tiled_cross_attention": Tiled,
}


def layout_of(spec: ModelSpec, reference: str) -> ImageLayout:
    """The layout of a model's batches."""
    return _LAYOUTS[spec.fusion](spec, reference)


def _filled(rows: Sequence[Sequence[EncodedRow]], name: str, images: int) -> torch.Tensor:
    """[rows, images, ...]: an input of each row's images, zeros where a row has fewer."""
    own = [[one.images[name] for one in row if one.images] for row in rows]
    sample = next(image for row in own for image in row)
    filled = sample.new_zeros(len(rows), images, *sample.shape[1:])
    for target, parts in zip(filled, own, strict=True):
        if parts:
            found = torch.cat(parts)
            target[: len(found)] = found
    return filled
