"""Images of one size: SigLIP's (resized to it) and CLIP's (shortest edge resized, then
center-cropped), bit-equal to transformers' image processors for upright 8-bit images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllama.ops.image import resize, resize_normalize
from mllama.processing.image import channel_values, load_pixels, normalization_table, once_each

MAX_EDGE = 2**14  # largest edge of a result in pixels
RESAMPLE = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
# CLIP's values, also those of LLaVA 1.5 and Meta's vision models.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class SquareImages:
    """Image transform: resize, center-crop if `crop` is set, normalize.

    Attributes:
        size: (height, width) of the resized image, or the length of its shortest edge.
        crop: (height, width) of the center crop, or None.
        table: [256, 3] float32, as `normalization_table` returns it.
        resample: "bicubic" or "bilinear".
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    table: torch.Tensor
    resample: str

    @property
    def result(self) -> tuple[int, int]:
        """(height, width) of the images that `__call__` returns."""
        size = self.crop or self.size
        return (size, size) if isinstance(size, int) else size

    def __call__(self, images: Sequence) -> dict[str, torch.Tensor]:
        """Transform images to pixel_values [images, 3, height, width] float32.

        Args:
            images: in any form that `load_image` accepts.

        Raises:
            TypeError, ValueError, FileNotFoundError: `load_image` rejects an image.
        """
        return {"pixel_values": self.pixel_values(once_each(load_pixels, images))}

    def pixel_values(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """`__call__` for images [H, W, 3] uint8.

        Raises:
            ValueError: images is empty.
        """
        if not images:
            raise ValueError("images is empty: give at least one image")
        return torch.stack(once_each(self._planes, images))

    def _planes(self, pixels: torch.Tensor) -> torch.Tensor:
        height, width = (
            shortest_edge_to(self.size, *pixels.shape[:2])
            if isinstance(self.size, int)
            else self.size
        )
        if self.crop:
            pixels = center_crop(resize(pixels, height, width, self.resample), *self.crop)
            height, width = self.crop
        return resize_normalize(pixels, height, width, self.table, self.resample)


def read_images(settings: dict, kind: str) -> SquareImages:
    """The transform for the settings of a SiglipImageProcessor or CLIPImageProcessor.

    Raises:
        ValueError: a setting is not supported or invalid; the message names it.
    """
    clip = kind == "CLIPImageProcessor"
    settings = {
        "size": 224,
        "crop_size": 224 if clip else None,
        "do_center_crop": clip,
        "resample": 3,
        "image_mean": CLIP_MEAN if clip else 0.5,
        "image_std": CLIP_STD if clip else 0.5,
    } | {name: value for name, value in settings.items() if value is not None}
    for name, neutral in (("do_resize", True), ("do_convert_rgb", True), ("do_pad", False)):
        if settings.get(name, neutral) is not neutral:
            raise ValueError(f"{name}={settings[name]!r} is not supported in a model folder")
    size = _size("size", settings["size"], square=not clip)
    crop = _size("crop_size", settings["crop_size"]) if settings["do_center_crop"] else None
    if isinstance(size, int) and crop is None:
        raise ValueError(f"size must name a height and a width, got {settings['size']!r}")
    return SquareImages(size, crop, read_table(settings), read_filter(settings["resample"]))


def read_table(settings: dict) -> torch.Tensor:
    """The normalization table of an image processor's settings: [256, 3] float32.

    Raises:
        ValueError: image_mean, image_std or rescale_factor is invalid.
    """
    normalized = settings.get("do_normalize", True)
    factor = settings.get("rescale_factor", 1 / 255) if settings.get("do_rescale", True) else 1.0
    if not isinstance(factor, (int, float)):
        raise ValueError(f"rescale_factor must be a number, got {factor!r}")
    return normalization_table(
        channel_values("image_mean", settings["image_mean"] if normalized else 0.0),
        channel_values("image_std", settings["image_std"] if normalized else 1.0),
        factor,
    )


def read_filter(resample: Any) -> str:
    """The filter of `mllama.ops.image.resize` for Pillow's number.

    Raises:
        ValueError: there is no such filter.
    """
    if resample not in RESAMPLE:
        known = ", ".join(f"{int(number)} ({name})" for number, name in RESAMPLE.items())
        raise ValueError(f"resample must be one of {known}, got {resample!r}")
    return RESAMPLE[resample]


def read_size(name: str, size: Any, square: bool = True) -> dict[str, int]:
    """Convert any spelling of a size in image processors' files to {"height": ..., "width": ...} or
    {"shortest_edge": ...}. A number is both edges, or the shortest one if `square` is False.

    Raises:
        ValueError: the size is invalid, or an edge is not an integer in 1..MAX_EDGE; the message
            begins with name.
    """
    if isinstance(size, int) and not isinstance(size, bool):
        size = {"height": size, "width": size} if square else {"shortest_edge": size}
    elif isinstance(size, (list, tuple)) and len(size) == 2:
        size = dict(zip(("height", "width"), size, strict=True))
    if not isinstance(size, dict):
        raise ValueError(f"{name} must be a number, two or a dict of them, got {size!r}")
    given = {edge: pixels for edge, pixels in size.items() if pixels is not None}
    check_edges(name, given)
    return given


def check_edges(name: str, size: dict) -> None:
    """Reject invalid sizes, and sizes that would exhaust the memory.

    Raises:
        ValueError: an edge is not an integer in 1..MAX_EDGE; the message begins with name.
    """
    for edge in size.values():
        if not isinstance(edge, int) or isinstance(edge, bool) or not 1 <= edge <= MAX_EDGE:
            raise ValueError(
                f"{name} must hold whole numbers of pixels in 1..{MAX_EDGE}, got {size}"
            )


def _size(name: str, size: Any, square: bool = True) -> tuple[int, int] | int:
    given = read_size(name, size, square)
    if set(given) == {"height", "width"}:
        return given["height"], given["width"]
    if set(given) == {"shortest_edge"}:
        return given["shortest_edge"]
    raise ValueError(f"{name} must have height and width, or shortest_edge alone, got {given}")


def shortest_edge_to(edge: int, height: int, width: int) -> tuple[int, int]:
    """(height, width) after resizing the shortest edge to `edge`, keeping the aspect ratio."""
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def center_crop(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """The center [height, width, 3] of an image [H, W, 3], zero-padded where the image is smaller.

    As in transformers' center_crop, an odd margin is smaller at the top and left when cropping,
    larger there when padding.
    """
    for axis, wanted in enumerate((height, width)):
        margin = pixels.shape[axis] - wanted
        if margin < 0:
            before = -(margin // 2)
            pads = [(0, 0)] * 3
            pads[axis] = (before, -margin - before)
            pixels = torch.from_numpy(np.pad(pixels.numpy(), pads))
        else:
            pixels = pixels.narrow(axis, margin // 2, wanted)
    return pixels
