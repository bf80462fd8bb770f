"""The picture functions of older scripts: the loose steps, and all of them at once through the
package's own image processor.
"""

import functools
import inspect
import math
from collections.abc import Callable, Sequence
from numbers import Integral, Real

import numpy as np
import torch
from PIL import Image

from mllama.processing.image import load_picture
from mllama.processing.prompt import lay_out
from mllama.processing.square import MAX_EDGE, SquareImageProcessor


def resize(
    image,
    size: tuple[int, int],
    resample: int | None = Image.Resampling.BICUBIC,
    reducing_gap: float | None = None,
) -> Image.Image:
    """Return a picture in another size, its aspect not kept, as a PIL picture of mode RGB.

    Args:
        image: a PIL picture, or what else `mllama.processing.image.load_picture` takes.
        size: (height, width) in pixels, in this order.
        resample: one of Pillow's filters; None is bicubic.
        reducing_gap: of `PIL.Image.Image.resize`.

    Raises:
        TypeError: image is no picture.
        ValueError: a size that is no two ints from 1, an unknown filter, or a picture that
            `load_picture` refuses.
        FileNotFoundError: a path that leads nowhere.
    """
    height, width = _edges("resize", size)
    resample = Image.Resampling.BICUBIC if resample is None else resample
    return load_picture(image).resize((width, height), resample=resample, reducing_gap=reducing_gap)


def rescale(image: np.ndarray, scale: float = 1 / 255, dtype: np.dtype = np.float32) -> np.ndarray:
    """Return image * scale, cast to dtype last."""
    return (np.asarray(image) * scale).astype(dtype)


def normalize(
    image: np.ndarray, mean: float | Sequence[float], std: float | Sequence[float]
) -> np.ndarray:
    """Return (image - mean) / std in the image's dtype, float32 for whole numbers.

    Args:
        image: [..., channels].
        mean, std: one number, or one per channel.

    Raises:
        ValueError: they are not as many as the channels, or std holds a zero.
    """
    image = np.asarray(image)
    if not np.issubdtype(image.dtype, np.floating):
        image = image.astype(np.float32)
    parts = []
    for name, given in (("mean", mean), ("std", std)):
        part = np.asarray(given, dtype=image.dtype)
        if part.size != 1 and part.shape != image.shape[-1:]:
            raise ValueError(
                f"normalize: {name} must be one number or one per channel of an image of shape {image.shape}, got {given!r}"
            )
        parts.append(part)
    if not parts[1].all():
        raise ValueError(f"normalize: std must hold no zero, got {std!r}")
    return (image - parts[0]) / parts[1]


def prepare(
    images, size, rescale_factor: float, image_mean, image_std, resample: int
) -> torch.Tensor:
    """Resize, rescale and normalise pictures: [pictures, 3, height, width] float32.

    Args:
        images: pictures of any kind `mllama.processing.image.load_picture` takes, one or a list.
        size: (height, width) in pixels, in this order.
        rescale_factor: of the 8-bit values.
        image_mean, image_std: one number, or one per channel.
        resample: one of Pillow's filters.

    Raises:
        TypeError: no picture, or an argument of another type.
        ValueError: no pictures, sizes or numbers that cannot be, or a picture that `load_picture`
            refuses.
        FileNotFoundError: a path that leads nowhere.
    """
    height, width = _edges("process_images", size)
    if not isinstance(rescale_factor, Real) or isinstance(rescale_factor, bool):
        raise TypeError(
            f"process_images: rescale_factor must be a number, got {type(rescale_factor).__name__}"
        )
    if not math.isfinite(rescale_factor):
        raise ValueError(f"process_images: rescale_factor must be finite, got {rescale_factor}")
    if not _is_filter(resample):
        raise ValueError(
            f"process_images: resample must be one of {', '.join(map(repr, Image.Resampling))}, got {resample!r}"
        )
    if isinstance(images, (list, tuple)) and not images:
        raise ValueError("process_images: images is empty: give at least one picture")
    processor = SquareImageProcessor(
        size={"height": height, "width": width},
        resample=Image.Resampling(resample),
        rescale_factor=float(rescale_factor),
        image_mean=image_mean,
        image_std=image_std,
    )
    return processor(images, return_tensors="pt")["pixel_values"]


def filter_may_come_third(
    process_images: Callable[..., torch.Tensor],
) -> Callable[..., torch.Tensor]:
    """A decorator of `process_images`, which some scripts call (images, size, resample,
    rescale_factor, image_mean, image_std).

    A filter in third place is told from a factor by its type, as an enum or its int. None stands
    for the default wherever there is one.
    """
    signature = inspect.signature(process_images)

    @functools.wraps(process_images)
    def either(images, size=None, *rest, **named):
        if rest and (rest[0] is None or _is_filter(rest[0])):
            bound = signature.bind(images, size, *rest[1:], resample=rest[0], **named)
        else:
            bound = signature.bind(images, size, *rest, **named)
        return process_images(
            **{
                name: value
                for name, value in bound.arguments.items()
                if value is not None or name == "images"
            }
        )

    return either


def add_image_tokens_to_prompts(
    prefix_prompt: str, bos_token: str | None, image_seq_len: int, image_token: str
) -> str:
    """Return image tokens + BOS + prompt + newline; without BOS (None) there is none, and what the
    prompt has already is not doubled.

    Raises:
        TypeError: prefix_prompt is no str.
    """
    if not isinstance(prefix_prompt, str):
        raise TypeError(f"prefix_prompt must be a str, got {type(prefix_prompt).__name__}")
    return lay_out(prefix_prompt, image_seq_len, image_token, bos_token)


def _is_filter(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value in set(Image.Resampling)


def _edges(owner: str, size: Sequence[int]) -> tuple[int, int]:
    if (
        isinstance(size, Sequence)
        and len(size) == 2
        and all(isinstance(edge, Integral) and 1 <= edge <= MAX_EDGE for edge in size)
    ):
        return int(size[0]), int(size[1])
    raise ValueError(
        f"{owner}: size must be (height, width) in pixels, each in 1..{MAX_EDGE}, got {size!r}"
    )
