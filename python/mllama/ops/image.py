"""Resizing of 8-bit RGB pictures, bit for bit as Pillow's `Image.resize` does it, alone and with normalisation fused behind it.

Pillow's arithmetic (src/libImaging/Resample.c): coefficients in double, normalised to sum 1, rounded half away from zero to integers with 22
fractional bits; a horizontal pass to 8 bits, then a vertical one. The filter always widens with the ratio, so that shrinking is antialiased.
"""

import numpy as np
import torch
from PIL import Image

from mllama.ops._dispatch import check_value

MAX_PIXELS = 2**27  # of the result, and of the picture between the two passes: a hostile size is refused before anything is allocated
_FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resize(image: torch.Tensor, height: int, width: int, resample: str = "bicubic") -> torch.Tensor:
    """Return the picture in another size, equal in every bit to Pillow's `Image.resize((width, height), resample)`.

    Args:
        image: [H, W, 3] uint8 on the CPU, any strides.
        height, width: of the result in pixels, at least 1; height * width and H * width at most MAX_PIXELS.
        resample: "bicubic" (a = -0.5) or "bilinear".

    Returns:
        [height, width, 3] uint8. There is no gradient.

    Raises:
        TypeError: image is no uint8 tensor, or a size is no int.
        ValueError: image is not [H, W, 3], empty, or not on the CPU; a size is out of range; an unknown filter.
    """
    _check("resize", image, height, width, resample)
    return reference(image, height, width, resample)


def resize_normalize(image: torch.Tensor, height: int, width: int, table: torch.Tensor, resample: str = "bicubic") -> torch.Tensor:
    """Resize as `resize` does, then look every 8-bit value up in a table and lay the channels out as planes.

    Args:
        image, height, width, resample: as in `resize`.
        table: [256, 3] float32: what value v of channel c becomes (`mllama.processing.image.normalisation_table`).

    Returns:
        [3, height, width] float32.

    Raises:
        TypeError, ValueError: as `resize`; table is no float32 tensor, or not [256, 3] on the CPU.
    """
    _check("resize_normalize", image, height, width, resample)
    if not isinstance(table, torch.Tensor) or table.dtype != torch.float32:
        raise TypeError(f"resize_normalize: table must be a float32 tensor, got {_kind(table)}")
    check_value(
        table.shape == (256, 3) and table.device.type == "cpu",
        f"resize_normalize: table must be [256, 3] on the CPU, got {tuple(table.shape)} on {table.device}",
    )
    return normalize_reference(image, height, width, table, resample)


def reference(image: torch.Tensor, height: int, width: int, resample: str = "bicubic") -> torch.Tensor:
    """`resize` by Pillow itself."""
    picture = Image.fromarray(image.contiguous().numpy())
    return torch.from_numpy(np.array(picture.resize((width, height), _FILTERS[resample])))


def normalize_reference(image: torch.Tensor, height: int, width: int, table: torch.Tensor, resample: str = "bicubic") -> torch.Tensor:
    """`resize_normalize` by Pillow and a lookup."""
    resized = reference(image, height, width, resample).long()
    return torch.stack([table[:, c][resized[:, :, c]] for c in range(3)])


def _kind(value) -> str:
    return str(value.dtype).removeprefix("torch.") + " tensor" if isinstance(value, torch.Tensor) else type(value).__name__


def _check(op: str, image: torch.Tensor, height: int, width: int, resample: str) -> None:
    if not isinstance(image, torch.Tensor) or image.dtype != torch.uint8:
        raise TypeError(f"{op}: image must be a uint8 tensor, got {_kind(image)}")
    check_value(
        image.dim() == 3 and image.shape[2] == 3 and image.numel() > 0 and image.device.type == "cpu",
        f"{op}: image must be [H, W, 3] on the CPU and not empty, got {tuple(image.shape)} on {image.device}",
    )
    for name, size in (("height", height), ("width", width)):
        if not isinstance(size, int) or isinstance(size, bool):
            raise TypeError(f"{op}: {name} must be an int, got {type(size).__name__}")
        check_value(size >= 1, f"{op}: {name} must be at least 1, got {size}")
    tallest = max(height, image.shape[0])
    check_value(
        tallest * width <= MAX_PIXELS,
        f"{op}: {image.shape[0]} x {image.shape[1]} to {height} x {width} takes {tallest * width} pixels on the way, at most {MAX_PIXELS}",
    )
    check_value(resample in _FILTERS, f"{op}: resample must be one of {', '.join(_FILTERS)}, got {resample!r}")
