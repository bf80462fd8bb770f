"""Decodes locations in PaliGemma's answers: `<loc0000>` ... and `<seg000>` ..."""

import math
import re
from numbers import Real
from typing import NamedTuple

_OBJECT = re.compile(r"((?:<loc\d{4}>){4})\s*((?:<seg\d{3}>){16})?([^;<>]*)", re.ASCII)
_GRID = 1024


class Detection(NamedTuple):
    """One object of an answer: its label, its box (x0, y0, x1, y1) in pixels, and 16 ids of
    segmentation tokens (0..127) or none.
    """

    label: str
    box: tuple[float, float, float, float]
    segments: tuple[int, ...]


def parse_detections(text: str, width: float, height: float) -> list[Detection]:
    """Parse the objects in an answer to "detect ..." or "segment ...", in order.

    An object is four `<locNNNN>`: y0, x0, y1, x1 on a grid of 1024 steps over the image; 16
    `<segNNN>` after "segment"; and its label. Objects are separated by ";". Anything else is
    ignored. Segmentation tokens are codes of PaliGemma's VQ-VAE, which this package does not
    include.

    Args:
        text: the answer, decoded with its location tokens (they are not special tokens:
            skip_special_tokens does not remove them).
        width, height: size of the image in pixels.

    Returns:
        One `Detection` per object.

    Raises:
        TypeError: text is not a str, or a size is not a number.
        ValueError: a size is not positive and finite.
    """
    if not isinstance(text, str):
        raise TypeError(f"text must be a str, got {type(text).__name__}")
    for name, size in (("width", width), ("height", height)):
        if not isinstance(size, Real) or isinstance(size, bool):
            raise TypeError(f"{name} must be a number, got {type(size).__name__}")
        if not 0 < size < math.inf:
            raise ValueError(f"{name} must be above 0, got {size}")
    width, height = float(width), float(height)
    found = []
    for places, segments, label in _OBJECT.findall(text):
        y0, x0, y1, x1 = (int(place) / _GRID for place in re.findall(r"\d{4}", places))
        codes = tuple(int(code) for code in re.findall(r"\d{3}", segments))
        if max(y0, x0, y1, x1) < 1 and max(codes, default=0) < 128:
            found.append(
                Detection(label.strip(), (x0 * width, y0 * height, x1 * width, y1 * height), codes)
            )
    return found
