"""Converts images of any kind to 8-bit RGB: files, encoded bytes, PIL images, arrays and tensors.

`mllama.processing.image_source` lists where encoded images may come from. Conversions:

- EXIF orientation (a file or a PIL image) is applied.
- Gray, 1-bit, palette, CMYK, YCbCr and HSV use Pillow's `convert("RGB")`.
- Transparent images (RGBA, LA, a palette or color key) are composited onto white.
- 16-bit gray ("I;16" in any byte order, and "I" of a PNG or PPM file, where Pillow puts 16 bits)
  is scaled from 0..65535 to 0..255 and rounded. Other "I" images (32-bit TIFF, `convert("I")`) are
  read as 0..255 if no value is above 255, else as 0..65535. Other values are rejected.
- Float gray ("F") is scaled from 0..1 to 0..255 if no value is above 1, else read as 0..255.
  Other values are rejected.
- uint8 arrays are unchanged; in bool arrays False is 0 and True is 255.
- uint16 arrays in any byte order are scaled as 16-bit gray, per channel.
- Float arrays and tensors are scaled from 0..1 (to within 1e-6) to 0..255 and rounded. Values
  outside are rejected.

Arrays are [H, W], or have an axis of 1, 3 or 4 channels (gray, RGB, RGBA) last or first. If both
fit ([3, H, 3], [1, W, 3]), a numpy array is read as channels last and a torch tensor as channels
first.
"""

import functools
import io
import math
from collections.abc import Callable, Iterable
from numbers import Real
from typing import Any

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from mllama.processing.image_source import is_encoded, is_url, open_source, shorten

# Formats that are opened from disk. The rest of Pillow's list is left out on purpose: EPS, for
# one, starts an interpreter.
FORMATS = (
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "ICO",
    "JPEG",
    "JPEG2000",
    "MPO",
    "PCX",
    "PNG",
    "PPM",
    "QOI",
    "TGA",
    "TIFF",
    "WEBP",
)


_SIXTEEN_BITS = ("PNG", "PPM")  # formats that Pillow opens in mode I for 16-bit values alone
_LOOKED_AT = 256  # bytes read to name an unknown format
_ROUNDING = 1e-6  # tolerance around 0..1 for float32 arithmetic


def load_image(source: Any, allow_urls: bool = False) -> Image.Image:
    """Load any accepted image as an upright PIL image of mode RGB, which may be the source itself;
    see above for conversions.

    Args:
        source: a path (str or Path) or a `file://` URL; bytes, bytearray or memoryview of an image
            file; a binary file object; a data URL or bare base64 text; a PIL image; a numpy array
            or a torch tensor.
        allow_urls: also accept an http(s) URL, downloading at most 64 MiB in 30 seconds.

    Raises:
        FileNotFoundError: the path does not exist.
        TypeError: source is not an image, an array has an unsupported dtype, or a file is opened
            as text.
        ValueError: a path is no regular file; a file is not an image, is broken, truncated, closed
            or too large (`PIL.Image.MAX_IMAGE_PIXELS`); base64 is broken; a URL comes without
            `allow_urls` or cannot be downloaded; an array is empty, or has an unsupported shape or
            values out of range.
    """
    if is_encoded(source):
        return _decode(*open_source(source, allow_urls))
    if isinstance(source, Image.Image):
        try:
            source.load()  # an image opened elsewhere may not be decoded yet
        except Exception as error:
            raise ValueError(
                f"cannot read the image {getattr(source, 'filename', '') or 'given as a PIL image'}"
                f": {_reason(error)}"
            ) from error
        return _to_rgb(source)
    return Image.fromarray(_array_to_rgb(source))


def load_pixels(source: Any) -> torch.Tensor:
    """Load any image that `load_image` accepts as [H, W, 3] uint8; raises the same errors."""
    if isinstance(source, (np.ndarray, torch.Tensor)):
        return torch.from_numpy(_array_to_rgb(source))
    return torch.from_numpy(np.array(load_image(source)))


def once_each(function: Callable, items: Iterable) -> list:
    """The function's results for each item, called once for an object that comes several times."""
    items, done = list(items), {}
    for item in items:
        if id(item) not in done:
            done[id(item)] = function(item)
    return [done[id(item)] for item in items]


def is_image(source: Any) -> bool:
    """Whether it can only be an image: any accepted form except text."""
    return not isinstance(source, str) and (
        is_encoded(source) or isinstance(source, (Image.Image, np.ndarray, torch.Tensor))
    )


def download_urls(images: Any, allow_urls: bool) -> Any:
    """Download the http(s) URLs among images if `allow_urls` is True. Lists keep their structure.

    Raises:
        TypeError: allow_urls is not a bool.
        ValueError: a download fails, or is not an image.
    """
    if not isinstance(allow_urls, bool):
        raise TypeError(f"allow_urls must be True or False, got {type(allow_urls).__name__}")
    if isinstance(images, (list, tuple)):
        return [download_urls(image, allow_urls) for image in images]
    return load_image(images, allow_urls) if allow_urls and is_url(images) else images


def channel_values(name: str, values: float | Iterable[float]) -> tuple[float, float, float]:
    """Mean or standard deviation per channel, given as one number for all or as three.

    Raises:
        ValueError: values are not finite numbers, or image_std has a zero; the message begins with
            name.
    """
    numbers = (
        (values,) * 3
        if isinstance(values, Real)
        else tuple(values)
        if isinstance(values, Iterable)
        else ()
    )
    if len(numbers) == 3 and all(
        isinstance(number, Real) and math.isfinite(number) for number in numbers
    ):
        if name != "image_std" or 0 not in numbers:
            return tuple(float(number) for number in numbers)
        raise ValueError(f"{name} must hold no zero, got {values!r}")
    raise ValueError(f"{name} must be one finite number or three, got {values!r}")


@functools.lru_cache(maxsize=16)
def normalization_table(
    mean: tuple[float, ...], std: tuple[float, ...], rescale_factor: float = 1 / 255
) -> torch.Tensor:
    """[256, 3] float32: the normalized value of each 8-bit value, per channel.

    v * rescale_factor in float64, rounded to float32, minus mean, divided by std: bit-equal to
    rescale and normalize of transformers' image processors. The result is shared between callers:
    do not modify it.

    Raises:
        ValueError: `channel_values` rejects mean or std.
    """
    mean, std = channel_values("image_mean", mean), channel_values("image_std", std)
    values = (np.arange(256).astype(np.float64) * rescale_factor).astype(np.float32)[:, None]
    return torch.from_numpy(
        (values - np.array(mean, dtype=np.float32)) / np.array(std, dtype=np.float32)
    )


def _decode(file: str | io.BytesIO, name: str) -> Image.Image:
    try:
        with Image.open(file) as image:
            limit = (
                Image.MAX_IMAGE_PIXELS
            )  # Pillow warns above it and raises above twice that; here it is the limit
            if limit is not None and image.width * image.height > limit:
                raise ValueError(f"{image.width} x {image.height} pixels, more than {limit}")
            if image.format not in FORMATS:
                raise ValueError(
                    f"the format {image.format} is not supported, only {', '.join(FORMATS)}"
                )
            image.load()
            return _to_rgb(image)
    except PermissionError:
        raise
    except UnidentifiedImageError as error:
        raise ValueError(f"cannot read the image {name}: {_what_it_is(file)}") from error
    except Exception as error:  # Pillow's decoders raise many types on malformed files
        raise ValueError(f"cannot read the image {name}: {_reason(error)}") from error


def _what_it_is(file: str | io.BytesIO) -> str:
    """Describe a file that is not an image."""
    if isinstance(file, io.BytesIO):
        begin = file.getvalue()[:_LOOKED_AT]
    else:
        with open(file, "rb") as opened:
            begin = opened.read(_LOOKED_AT)
    if not begin:
        return "it is empty"
    page = begin.lstrip().lower().startswith((b"<!doctype html", b"<html"))
    return (
        "it is an HTML page"
        if page
        else f"it is no image of a known format, and begins with {begin[:16]!r}"
    )


def _reason(error: Exception) -> str:
    return shorten(str(error), 300) or type(error).__name__


def _to_rgb(image: Image.Image) -> Image.Image:
    """An upright RGB image, which may be the argument; that is not changed."""
    if image.width == 0 or image.height == 0:
        raise ValueError(f"the image has no pixels: {image.width} x {image.height}")
    deep = image.mode.startswith("I;") or image.format in _SIXTEEN_BITS
    if image.getexif().get(ExifTags.Base.Orientation, 1) != 1:  # exif_transpose copies the image
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        values = _integers(np.array(image), deep)
        key = image.info.get(
            "transparency"
        )  # a 16-bit PNG's color key; Pillow reads it, but does not apply it to this mode
        if isinstance(key, int):
            values[values == key] = 65535
        return Image.fromarray(_array_to_rgb(values))
    if image.mode == "F":
        values = np.array(image)
        low, high = values.min(), values.max()
        if low < -_ROUNDING or high > 255 * (1 + _ROUNDING):
            raise ValueError(
                f"an image of mode F must hold 0..1 or 0..255, got {low:.8g}..{high:.8g}"
            )
        return Image.fromarray(_array_to_rgb(values / 255 if high > 1 + _ROUNDING else values))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def _integers(values: np.ndarray, deep: bool) -> np.ndarray:
    """The values of an image of mode I as uint16; if `deep` they are 16-bit, else that depends."""
    low, high = values.min(), values.max()
    if low < 0 or high > 65535:
        raise ValueError(f"an image of mode I must hold 0..65535, got {low}..{high}")
    return (values if deep or high > 255 else values * 257).astype(np.uint16)


def _array_to_rgb(source) -> np.ndarray:
    """An array or tensor as [H, W, 3] uint8, contiguous."""
    is_tensor = isinstance(source, torch.Tensor)
    if not is_tensor and not isinstance(source, np.ndarray):
        raise TypeError(
            "an image must be a path, bytes, a file, a data URL, a PIL image, a numpy array or a "
            "torch tensor,"
            f" got {type(source).__name__}"
        )
    shape = tuple(source.shape)
    if 0 in shape:
        raise ValueError(f"the image has no pixels: shape {shape}")
    if is_tensor:
        if source.is_meta:
            raise ValueError(f"the image is a meta tensor, without values: shape {shape}")
        source = source.detach().cpu().resolve_conj().resolve_neg()
        source = (source.float() if source.dtype == torch.bfloat16 else source).numpy()
    pixels = _eight_bits(_channels_last(source, first=is_tensor))
    if pixels.shape[2] == 4:
        return np.array(_to_rgb(Image.fromarray(pixels)))
    return np.array(np.broadcast_to(pixels, (*pixels.shape[:2], 3)), order="C")


def _channels_last(pixels: np.ndarray, first: bool) -> np.ndarray:
    if pixels.ndim == 2:
        return pixels[:, :, None]
    for axis in (0, -1) if first else (-1, 0):
        if pixels.ndim == 3 and pixels.shape[axis] in (1, 3, 4):
            return np.moveaxis(pixels, axis, -1)
    raise ValueError(
        "an image must be [H, W], [H, W, C] or [C, H, W] with 1, 3 or 4 channels, got shape "
        f"{pixels.shape}"
    )


def _eight_bits(pixels: np.ndarray) -> np.ndarray:
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * 255
    if pixels.dtype.newbyteorder("=") == np.uint16:
        return ((pixels.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if np.issubdtype(pixels.dtype, np.floating):
        low, high = pixels.min(), pixels.max()
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):  # in this form NaN fails too
            raise ValueError(
                f"an image of floats must hold 0..1, got {low:.8g}..{high:.8g}: divide by its full "
                "scale, or cast to uint8"
            )
        return np.rint(pixels.astype(np.float32).clip(0, 1) * 255).astype(np.uint8)
    raise TypeError(f"an image's dtype must be uint8, uint16, bool or float, got {pixels.dtype}")
