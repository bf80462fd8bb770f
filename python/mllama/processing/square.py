"""Images of one size: SigLIP's (squeezed into it) and CLIP's (shortest edge to it, then the
center), bit-equal to transformers' image processors for upright 8-bit images.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from mllama.ops.image import resize, resize_normalize
from mllama.processing.image import channel_values, load_pixels, normalization_table

MAX_EDGE = 2**14  # of a result, in pixels
RESAMPLE = {Image.Resampling.BILINEAR: "bilinear", Image.Resampling.BICUBIC: "bicubic"}
# CLIP's, which LLaVA 1.5 and Meta's vision models have.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)


@dataclass(frozen=True)
class SquareImages:
    """What becomes of an image: resized, cropped where `crop` says so, then normalized.

    Attributes:
        size: (height, width) of the resized image, or the length of its shortest edge.
        crop: (height, width) of the center that is kept, or None.
        table: [256, 3] float32, as `normalization_table` returns it.
        resample: "bicubic" or "bilinear".
    """

    size: tuple[int, int] | int
    crop: tuple[int, int] | None
    table: torch.Tensor
    resample: str

    @property
    def result(self) -> tuple[int, int]:
        """Height and width of what `__call__` returns."""
        size = self.crop or self.size
        return (size, size) if isinstance(size, int) else size

    def __call__(self, images: Sequence) -> dict[str, torch.Tensor]:
        """Return pixel_values [images, 3, height, width] float32.

        Args:
            images: of any kind that `load_image` takes.

        Raises:
            TypeError, ValueError, FileNotFoundError: an image that `load_image` refuses.
        """
        return {"pixel_values": self.pixel_values([load_pixels(image) for image in images])}

    def pixel_values(self, images: Sequence[torch.Tensor]) -> torch.Tensor:
        """`__call__` for images that are [H, W, 3] uint8.

        Raises:
            ValueError: no images.
        """
        if not images:
            raise ValueError("images is empty: give at least one image")
        return torch.stack([self._planes(image) for image in images])

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
    """Return what the settings of a SiglipImageProcessor or CLIPImageProcessor say.

    Raises:
        ValueError: a setting that is not supported or no such value, by name.
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
            raise ValueError(f"{name}={settings[name]!r} is not supported in the folder of a model")
    size = _size("size", settings["size"], square=not clip)
    crop = _size("crop_size", settings["crop_size"]) if settings["do_center_crop"] else None
    if isinstance(size, int) and crop is None:
        raise ValueError(f"size must name a height and a width, got {settings['size']!r}")
    return SquareImages(size, crop, read_table(settings), read_filter(settings["resample"]))


def read_table(settings: dict) -> torch.Tensor:
    """The normalization that an image processor's settings say: [256, 3] float32.

    Raises:
        ValueError: image_mean, image_std or rescale_factor is none.
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
    """The filter that `mllama.ops.image.resize` has for Pillow's number.

    Raises:
        ValueError: resample is another.
    """
    if resample not in RESAMPLE:
        known = ", ".join(f"{int(number)} ({name})" for number, name in RESAMPLE.items())
        raise ValueError(f"resample must be one of {known}, got {resample!r}")
    return RESAMPLE[resample]


def read_size(name: str, size: Any, square: bool = True) -> dict[str, int]:
    """Return a size in any spelling of image processors' files as {"height": ..., "width": ...} or
    {"shortest_edge": ...}; a number is both edges, or the shortest where `square` is False.

    Raises:
        ValueError: it is none, or an edge is no whole number of pixels in 1..MAX_EDGE; the text
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
    """Refuse sizes that are none, or that a hostile folder gives to fill the memory.

    Raises:
        ValueError: an edge is no whole number of pixels in 1..MAX_EDGE; the text begins with name.
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
    raise ValueError(f"{name} must hold height and width, or shortest_edge alone, got {given}")


def shortest_edge_to(edge: int, height: int, width: int) -> tuple[int, int]:
    """Height and width of an image whose shortest edge becomes `edge`, its aspect kept."""
    if width <= height:
        return int(edge * height / width), edge
    return edge, int(edge * width / height)


def center_crop(pixels: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Return the center [height, width, 3] of an image [H, W, 3]; where the image ends it is zero.

    Of odd margins the smaller is above and to the left of an image that is cropped, the larger of
    one that is filled up, as transformers' center_crop has it.
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
