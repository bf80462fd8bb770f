"""Llama-3.2-Vision's images: up to four tiles per image, and the mask of tiles visible to each
token. Bit-equal to transformers' MllamaImageProcessor for upright 8-bit images.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image

from mllama.ops.image import MAX_PIXELS, resize_normalize
from mllama.processing.image import load_pixels, once_each
from mllama.processing.square import RESAMPLE, read_size, read_table

_MOST_TILES = 1024  # arrangements are enumerated in a double loop


@dataclass(frozen=True)
class TiledImages:
    """Tiles images. An image is resized, keeping its aspect ratio, onto the canvas of at most
    `max_image_tiles` tiles of size x size pixels that shrinks it least, with black below and to
    the right. Unused tiles are zero after normalization.

    Attributes:
        size: edge of a tile in pixels.
        max_image_tiles: maximum number of tiles per image.
        table: [256, 3] float32, as `normalization_table` returns it.
        resample: the filter, by Pillow's number.
    """

    size: int
    max_image_tiles: int
    table: torch.Tensor
    resample: int = 2

    def __call__(self, rows: Sequence[Sequence]) -> dict:
        """Tile the images of B rows, at most N per row.

        Args:
            rows: lists of images in any form that `load_image` accepts, at least one in all.

        Returns:
            pixel_values [B, N, max_image_tiles, 3, size, size] float32; aspect_ratio_ids [B, N]
            int64, 1 + the index among the arrangements, 0 where a row has no image;
            aspect_ratio_mask [B, N, max_image_tiles] int64, 1 for tiles in use and for every
            first tile; num_tiles, the number of tiles of each image, per row.

        Raises:
            TypeError, ValueError, FileNotFoundError: `load_image` rejects an image.
        """
        loaded = iter(once_each(load_pixels, (image for row in rows for image in row)))
        return self.tiles([[next(loaded) for _ in row] for row in rows])

    def tiles(self, rows: Sequence[Sequence[torch.Tensor]]) -> dict:
        """`__call__` for images [H, W, 3] uint8."""
        if not any(rows):
            raise ValueError("give at least one image")
        size, most = (len(rows), max(map(len, rows))), self.max_image_tiles
        shape = (*size, most, 3, self.size, self.size)
        pixels = torch.zeros(shape, dtype=torch.float32, device="cpu")
        ids = torch.zeros(size, dtype=torch.int64, device="cpu")
        mask = torch.zeros(*size, most, dtype=torch.int64, device="cpu")
        mask[:, :, 0] = 1
        num_tiles: list[list[int]] = [[] for _ in rows]
        resized = iter(once_each(self._resize, (image for row in rows for image in row)))
        for b, row in enumerate(rows):
            for n in range(len(row)):
                arrangement, planes = next(resized)
                lay_onto_tiles(pixels[b, n], arrangement, planes, self.table[0])
                ids[b, n] = arrangements(most).index(arrangement) + 1
                num_tiles[b].append(math.prod(arrangement))
                mask[b, n, : num_tiles[b][-1]] = 1
        return {
            "pixel_values": pixels,
            "aspect_ratio_ids": ids,
            "aspect_ratio_mask": mask,
            "num_tiles": num_tiles,
        }

    def _resize(self, image: torch.Tensor) -> tuple[tuple[int, int], torch.Tensor]:
        """The arrangement of tiles for an image [H, W, 3] uint8; and the image, resized and
        normalized, [3, height, width] float32.
        """
        arrangement, target = fit_onto_tiles(*image.shape[:2], self.max_image_tiles, self.size)
        if self.resample not in RESAMPLE:  # only Pillow has this filter
            resized = Image.fromarray(image.numpy()).resize(target[::-1], self.resample)
            image = torch.from_numpy(np.array(resized))
        filter = RESAMPLE.get(self.resample, "bilinear")
        return arrangement, resize_normalize(image, *target, self.table, filter)


def read_tiles(settings: dict) -> TiledImages:
    """The transform for the settings of a MllamaImageProcessor.

    Raises:
        ValueError: a setting is not supported or invalid; the message names it.
    """
    given = {name: value for name, value in settings.items() if value is not None}
    settings = {"size": 224, "max_image_tiles": 4, "resample": 2} | given
    settings = {"image_mean": 0.5, "image_std": 0.5} | settings
    for name in ("do_resize", "do_pad", "do_convert_rgb"):
        if settings.get(name, True) is not True:
            raise ValueError(f"{name}={settings[name]!r} is not supported: images are always tiled")
    if settings.get("do_center_crop"):
        raise ValueError("do_center_crop is not supported: images are always tiled")
    size = read_size("size", settings["size"])
    check_tiles(size.get("height"), size.get("width"), settings["max_image_tiles"])
    resample = settings["resample"]
    if resample not in list(Image.Resampling):
        raise ValueError(f"resample must be one of Pillow's filters, 0..5, got {resample!r}")
    return TiledImages(
        size["height"], settings["max_image_tiles"], read_table(settings), int(resample)
    )


def check_tiles(height, width, max_image_tiles) -> None:
    """Reject tiles that are not square, or too many or too large for the memory.

    Raises:
        ValueError: size or max_image_tiles is invalid.
    """
    for name, value in (("size", height), ("size", width), ("max_image_tiles", max_image_tiles)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name} must be at least 1, got {value!r}")
    if height != width:
        raise ValueError(f"size must be square, got {height} x {width}")
    if max_image_tiles > _MOST_TILES or max_image_tiles * height**2 > MAX_PIXELS:
        raise ValueError(
            f"max_image_tiles {max_image_tiles} of {height} pixels: at most {_MOST_TILES}, and"
            f" {MAX_PIXELS} pixels in all"
        )


@functools.lru_cache(maxsize=10)
def arrangements(max_image_tiles: int) -> tuple[tuple[int, int], ...]:
    """All (rows, columns) with at most `max_image_tiles` tiles, in the order of their ids."""
    numbers = range(1, max_image_tiles + 1)
    return tuple(
        (high, wide) for high in numbers for wide in numbers if high * wide <= max_image_tiles
    )


def fit_onto_tiles(
    height: int, width: int, max_image_tiles: int, tile: int
) -> tuple[tuple[int, int], tuple[int, int]]:
    """The (rows, columns) of an image's canvas, and the image's (height, width) on it.

    Among the canvases that need no shrinking, the one with the least enlargement; else the one
    with the least shrinking; of equal ones the smallest.
    """
    canvases = np.array(arrangements(max_image_tiles)) * tile  # [arrangements, 2]
    scales = (canvases / (height, width)).min(axis=1)
    growing = scales[scales >= 1]
    best = canvases[scales == (growing.min() if len(growing) else scales.max())]
    high, wide = (int(edge) for edge in best[np.argmin(best[:, 0] * best[:, 1])])
    target_height, target_width = min(max(height, tile), high), min(max(width, tile), wide)
    scale_h, scale_w = target_height / height, target_width / width
    if scale_w < scale_h:
        target_height = min(math.floor(height * scale_w) or 1, target_height)
    else:
        target_width = min(math.floor(width * scale_h) or 1, target_width)
    return (high // tile, wide // tile), (target_height, target_width)


def lay_onto_tiles(
    tiles: torch.Tensor, arrangement: tuple[int, int], planes: torch.Tensor, black: torch.Tensor
) -> None:
    """Write planes [3, h, w] into tiles [most, 3, tile, tile], row by row. The rest of the
    arrangement's tiles becomes black [3].
    """
    tile = tiles.shape[-1]
    for number in range(arrangement[0] * arrangement[1]):
        top, left = number // arrangement[1] * tile, number % arrangement[1] * tile
        part = planes[:, top : top + tile, left : left + tile]
        if part.shape[1:] != tiles.shape[2:]:
            tiles[number] = black[:, None, None]
        tiles[number, :, : part.shape[1], : part.shape[2]] = part


def cross_attention_mask(
    input_ids: Sequence[Sequence[int]],
    image_token_id: int,
    num_tiles: Sequence[Sequence[int]],
    max_image_tiles: int,
) -> torch.Tensor:
    """The tiles visible to each token: [B, T, N, max_image_tiles] int64, 1 where visible.

    An image is visible from its placeholder to the next one. Images with consecutive placeholders
    are visible together, and the last is visible to the end of the row.

    Args:
        input_ids: B rows of T ids.
        image_token_id: id of the placeholder.
        num_tiles: number of tiles of each image, per row.
        max_image_tiles: maximum number of tiles per image.
    """
    length, most = max(map(len, input_ids)), max(map(len, num_tiles))
    mask = torch.zeros(
        len(input_ids), length, most, max_image_tiles, dtype=torch.int64, device="cpu"
    )
    for row, (ids, tiles) in enumerate(zip(input_ids, num_tiles, strict=True)):
        for image, (start, end) in enumerate(_visible_spans(ids, image_token_id)[: len(tiles)]):
            mask[row, start:end, image, : tiles[image]] = 1
    return mask


def _visible_spans(ids: Sequence[int], image_token_id: int) -> list[tuple[int, int]]:
    """(start, end) of the positions where each image of a row is visible."""
    places = [place for place, token in enumerate(ids) if token == image_token_id]
    spans: list[tuple[int, int]] = []
    end = len(ids)
    for start, after in reversed(list(zip(places, [*places, len(ids)][1:], strict=True))):
        end = end if after == start + 1 else after
        spans.insert(0, (start, end))
    return spans
