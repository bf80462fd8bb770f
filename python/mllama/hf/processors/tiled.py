"""Llama-3.2-Vision's processor: up to four tiles per image, and the mask of tiles visible to each
token.

transformers' MllamaImageProcessor and MllamaProcessor on this package's image loading and C++
resize, bit-equal to transformers' for upright 8-bit images.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil
from transformers.models.mllama.processing_mllama import MllamaProcessor

from mllama.hf.processors.chat import ChatTemplates
from mllama.hf.processors.folders import StockFiles
from mllama.hf.processors.options import IMAGES, check_rows, merge_options, on_cpu
from mllama.hf.processors.square import OwnImages
from mllama.processing.image import download_urls
from mllama.processing.prompt import (
    adds_bos,
    check_whole,
    in_order,
    inserted,
    put_bos,
    share_out_rows,
)
from mllama.processing.square import read_table
from mllama.processing.tiled import TiledImages, check_tiles, cross_attention_mask

_FITTED = "images are always tiled"


class TiledImageProcessor(OwnImages, MllamaImageProcessorPil):
    """transformers' Llama-3.2-Vision image processor on this package's image loading.

    An image is resized, keeping its aspect ratio, onto the canvas of at most max_image_tiles tiles
    of size x size pixels that shrinks it least, with black below and to the right. Unused tiles
    are zero after normalization.

    Takes one image, a flat list (one row), or a list of images (or None) per row, in any form that
    `load_image` accepts. Returns, for B rows of at most N images:

    - pixel_values [B, N, max_image_tiles, 3, size, size] float32;
    - aspect_ratio_ids [B, N] int64: 1 + the index among the arrangements, 0 where a row has no
      image;
    - aspect_ratio_mask [B, N, max_image_tiles] int64: 1 for tiles in use, and for every first
      tile;
    - num_tiles: the number of tiles of each image, per row.

    Raises:
        TypeError, ValueError, FileNotFoundError: `load_image` rejects an image.
        ValueError: there is no image; tiles are not square, or too many or too large for the
            memory.
    """

    kind = "MllamaImageProcessor"
    refused = IMAGES | {
        "crop_size": (lambda value: value is None, _FITTED),
        "do_center_crop": (lambda value: not value, _FITTED),
        "do_pad": (lambda value: value is not False, _FITTED),
        "do_resize": (lambda value: value is not False, _FITTED),
        "pad_size": (lambda value: value is None, _FITTED),
    }

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        check_tiles(self.size.height, self.size.width, self.max_image_tiles)

    def _prepare_images_structure(self, images, expected_ndims: int = 3) -> list[list]:
        rows = as_rows(images)
        if not any(rows):
            raise ValueError("give at least one image")
        return rows

    def _preprocess(self, images, **settings: Any) -> BatchFeature:
        size, most = settings["size"], settings["max_image_tiles"]
        check_tiles(size.height, size.width, most)
        tiled = TiledImages(size.height, most, read_table(settings), settings["resample"])
        batch = tiled.tiles(
            [[torch.from_numpy(image.transpose(1, 2, 0)) for image in row] for row in images]
        )
        num_tiles = batch.pop("num_tiles")
        arrays = {name: value.numpy() for name, value in batch.items()}
        found = BatchFeature(arrays, tensor_type=settings.get("return_tensors"))
        found["num_tiles"] = num_tiles
        return found


class TiledProcessor(ChatTemplates, StockFiles, MllamaProcessor):
    """Text and images for Llama-3.2-Vision, called as `processor(images=..., text=...)`.

    Unlike transformers' MllamaProcessor, rows with and without images may be mixed in a batch, BOS
    is not repeated if the tokenizer adds one itself, and images may be in any form that
    `load_image` accepts.

    A prompt has one `<|image|>` per image. BOS is added after leading `<|image|>` unless the prompt
    has it. An image is visible from its `<|image|>` to the next one; images with consecutive
    placeholders are visible together.

    Args:
        image_processor: a `TiledImageProcessor`, or a MllamaImageProcessor of transformers, which
            is converted.
        tokenizer: a transformers tokenizer with `<|image|>`.
        chat_template: a Jinja template.

    Raises:
        ValueError: image_processor is of another class, or the tokenizer has no `<|image|>`.
    """

    stock_class, image_class = MllamaProcessor, TiledImageProcessor

    def __init__(
        self,
        image_processor: Any,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None = None,
    ):
        super().__init__(self.as_own(image_processor), tokenizer, chat_template=chat_template)
        if (
            self.image_token_id is None
            or tokenizer.convert_ids_to_tokens(self.image_token_id) != self.image_token
        ):
            raise ValueError(f"the tokenizer has no token {self.image_token}")

    @on_cpu
    def __call__(
        self,
        images: Any = None,
        text: str | Sequence[str] | None = None,
        videos: None = None,
        audio: None = None,
        allow_urls: bool = False,
        **kwargs: Any,
    ) -> BatchFeature:
        """Encode prompts: input_ids and attention_mask [B, T] and, with images, the output of
        `TiledImageProcessor` except num_tiles.

        With both, also cross_attention_mask [B, T, N, max_image_tiles] int64: 1 where a tile is
        visible to a token.

        Args:
            images: one image or a flat list for one prompt; for several prompts one list (or
                None) per prompt.
            text: a prompt or a list of prompts.
            allow_urls: download images given as http(s) URLs.
            kwargs: options of the tokenizer and the image processor (padding, return_tensors ...).

        Raises:
            TypeError: text is not text, an image is not an image, there are videos or audio, or an
                option is unknown.
            ValueError: an option's value is not supported; rows have unequal lengths without
                padding; the numbers of images and `<|image|>` of a prompt differ, as always for a
                flat list with several prompts; truncation cuts an `<|image|>`; `load_image`
                rejects an image.
        """
        text, images = in_order(text, images, videos, audio)
        images = download_urls(images, allow_urls)
        merged = merge_options(self, kwargs)
        text_kwargs, images_kwargs = (
            {"return_token_type_ids": False, **merged["text_kwargs"]},
            merged["images_kwargs"],
        )
        tensors = text_kwargs.pop("return_tensors", None)
        if text is None:
            tiles = self.image_processor(images, **images_kwargs)
            tiles.pop("num_tiles")
            return BatchFeature(tiles)
        prompts = [text] if isinstance(text, str) else list(text)
        if not prompts:
            raise ValueError("text is an empty list: give at least one prompt")
        rows = share_out_rows(prompts, images, self.image_token)
        offsets: list[list[dict]] = [[] for _ in prompts]
        if self.bos_token is not None:
            given, prompts = (
                prompts,
                [put_bos(prompt, self.bos_token, self.image_token) for prompt in prompts],
            )
            offsets = [
                []
                if prompt == longer
                else inserted(longer.find(self.bos_token), self.bos_token, [])
                for prompt, longer in zip(given, prompts, strict=True)
            ]
            if adds_bos(self.tokenizer):
                text_kwargs["add_special_tokens"] = False
        data = dict(self.tokenizer(prompts, **text_kwargs))
        check_rows(data["input_ids"], tensors)
        check_whole(data["input_ids"], self.image_token_id, [len(row) for row in rows])
        if merged["return_mm_token_type_ids"]:
            data["mm_token_type_ids"] = self.create_mm_token_type_ids(data["input_ids"])
        if merged["return_text_replacement_offsets"]:
            data["text_replacement_offsets"] = offsets
        if any(rows):
            tiles = self.image_processor(rows, **images_kwargs)
            data["cross_attention_mask"] = cross_attention_mask(
                [list(ids) for ids in data["input_ids"]],
                self.image_token_id,
                tiles.pop("num_tiles"),
                tiles["aspect_ratio_mask"].shape[-1],
            ).numpy()
            data.update(tiles)
        return BatchFeature(
            data, tensor_type=tensors, skip_tensor_conversion=["text_replacement_offsets"]
        )

    def to_dict(self) -> dict:
        """The content of processor_config.json: a MllamaProcessor."""
        return {**super().to_dict(), "processor_class": "MllamaProcessor"}


def as_rows(images) -> list[list]:
    """Rows of images, from one image, a flat list, an array [N, ...], or a list of images (or None)
    per row.
    """
    if not isinstance(images, (list, tuple)):
        return [_row(images)]
    if not any(
        item is None or isinstance(item, (list, tuple)) or getattr(item, "ndim", 3) == 4
        for item in images
    ):
        return [list(images)]
    return [[] if item is None else _row(item) for item in images]


def _row(item) -> list:
    return (
        list(item) if isinstance(item, (list, tuple)) or getattr(item, "ndim", 3) == 4 else [item]
    )
