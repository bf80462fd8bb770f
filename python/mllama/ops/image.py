"""Resizing of 8-bit RGB images, bit-equal to Pillow's `Image.resize`, with optional normalization.

Pillow's arithmetic (src/libImaging/Resample.c): weights in double, normalized to sum 1, rounded
half away from zero to integers with 22 fractional bits; one direction, rounded to 8 bits, then the
other. The filter widens with the ratio, so shrinking is antialiased.
"""

import numpy as np
import PIL
import torch
from PIL import Image

from mllama.ops._dispatch import check_device, check_value, register, use_kernel

# Limit of the result and of the image between the passes: larger sizes are rejected before
# allocation.
MAX_PIXELS = 2**27
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
_PILLOW = tuple(int(part) for part in PIL.__version__.split(".")[:2])


def resize(image: torch.Tensor, height: int, width: int, resample: str = "bicubic") -> torch.Tensor:
    """Resize an image, bit-equal to the installed Pillow's `Image.resize((width, height),
    resample)`.

    Args:
        image: [H, W, 3] uint8 on the CPU or a CUDA device, any strides.
        height, width: size of the result in pixels, at least 1. Neither the result nor the image
            between the two passes ([H, width] or [height, W]) may have more than MAX_PIXELS.
        resample: "bicubic" (a = -0.5) or "bilinear".

    Returns:
        [height, width, 3] uint8 on the image's device. There is no gradient.

    Raises:
        TypeError: image is not a uint8 tensor, or a size is not an int.
        ValueError: image is not [H, W, 3], is empty, or is on another device; a size is out of
            range; the filter is unknown.
    """
    height_first = _check("resize", image, height, width, resample)
    if use_kernel("image", image):
        return _resize(image, height, width, resample == "bicubic", height_first)
    return reference(image, height, width, resample)


def resize_normalize(
    image: torch.Tensor, height: int, width: int, table: torch.Tensor, resample: str = "bicubic"
) -> torch.Tensor:
    """Resize as `resize` does, then map every 8-bit value through a table and move the channels
    first.

    Args:
        image, height, width, resample: as in `resize`.
        table: [256, 3] float32: the result for value v of channel c
            (`mllama.processing.image.normalization_table`).

    Returns:
        [3, height, width] float32 on the image's device.

    Raises:
        TypeError, ValueError: as `resize`; table is not a float32 tensor [256, 3] on the
            image's device.
    """
    height_first = _check("resize_normalize", image, height, width, resample)
    if not isinstance(table, torch.Tensor) or table.dtype != torch.float32:
        raise TypeError(f"resize_normalize: table must be a float32 tensor, got {_kind(table)}")
    check_value(
        table.shape == (256, 3) and table.device == image.device,
        f"resize_normalize: table must be [256, 3] on {image.device}, as image, "
        f"got {tuple(table.shape)} on {table.device}",
    )
    if use_kernel("image", image):
        return _resize_normalize(image, height, width, table, resample == "bicubic", height_first)
    return normalize_reference(image, height, width, table, resample)


def reference(
    image: torch.Tensor, height: int, width: int, resample: str = "bicubic"
) -> torch.Tensor:
    """`resize` with Pillow itself."""
    source = Image.fromarray(image.contiguous().cpu().numpy())
    resized = np.array(source.resize((width, height), _FILTERS[resample]))
    return torch.from_numpy(resized).to(image.device)


def normalize_reference(
    image: torch.Tensor, height: int, width: int, table: torch.Tensor, resample: str = "bicubic"
) -> torch.Tensor:
    """`resize_normalize` with Pillow and a lookup."""
    resized = reference(image, height, width, resample).long()
    return torch.stack([table[:, c][resized[:, :, c]] for c in range(3)])


def _check(op: str, image: torch.Tensor, height: int, width: int, resample: str) -> bool:
    """Check the arguments; return whether Pillow resizes the height first."""
    if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8:
        raise TypeError(f"{op}: image must be a uint8 tensor, got {_kind(image)}")
    check_value(
        image.dim() == 3
        and image.shape[2] == 3
        and image.numel() > 0
        and image.device.type in ("cpu", "cuda"),
        f"{op}: image must be [H, W, 3] on the CPU or a CUDA device and not empty, "
        f"got {tuple(image.shape)} on {image.device}",
    )
    for name, size in (("height", height), ("width", width)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{op}: {name} must be an int, got {type(size).__name__}")
        check_value(size >= 1, f"{op}: {name} must be at least 1, got {size}")
    check_value(
        isinstance(resample, str) and resample in _FILTERS,
        f"{op}: resample must be one of {', '.join(_FILTERS)}, got {resample!r}",
    )
    in_height, in_width = image.shape[:2]
    height_first = _height_first(in_height, in_width, height, width)
    most = max(height * width, height * in_width if height_first else in_height * width)
    check_value(
        most <= MAX_PIXELS,
        f"{op}: {in_height} x {in_width} to {height} x {width} needs {most} pixels, "
        f"more than {MAX_PIXELS}",
    )
    return height_first


def _height_first(in_height: int, in_width: int, height: int, width: int) -> bool:
    """Pillow's order, which depends on its version. It rounds to 8 bits between the passes, so the
    order affects the last bit.
    """
    less_high, less_wide = in_height - height, in_width - width
    if _PILLOW >= (13, 0):
        return less_high > 0 and less_high > 2 * less_wide
    return _PILLOW >= (12, 2) and less_high > 0 and in_height > 100 * in_width


def _kind(value) -> str:
    return (
        f"{str(value.dtype).removeprefix('torch.')} tensor"
        if isinstance(value, torch.Tensor)
        else type(value).__name__
    )


def _check_table(image, height, width, table, cubic, height_first) -> None:
    check_device("resize_normalize", "table", table, "image", image)


_resize = register(
    "resize",
    fake=lambda image, height, width, cubic, height_first: image.new_empty(height, width, 3),
)
_resize_normalize = register(
    "resize_normalize",
    check=_check_table,
    fake=lambda image, height, width, table, cubic, height_first: table.new_empty(3, height, width),
)
