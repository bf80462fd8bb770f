"""Anti-aliased masks of the six shapes, and of text with a box for each character."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SHAPES = ("circle", "square", "triangle", "star", "ring", "cross")


def _rotated(points: np.ndarray, degrees: float) -> np.ndarray:
    a = math.radians(degrees)
    return points @ np.array([[math.cos(a), math.sin(a)], [-math.sin(a), math.cos(a)]])


def _on_circle(count: int, start: float = -90.0) -> np.ndarray:
    angles = np.radians(start + 360.0 / count * np.arange(count))
    return np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _square(rng: np.random.Generator) -> np.ndarray:
    tilt = (
        0.0
        if rng.random() < 0.6
        else rng.uniform(-20, 20)
        if rng.random() < 0.8
        else rng.uniform(0, 90)
    )
    side = 0.86 if tilt == 0.0 else 0.78
    return _rotated(np.array([[-side, -side], [side, -side], [side, side], [-side, side]]), tilt)


def _triangle(rng: np.random.Generator) -> np.ndarray:
    kind = rng.random()
    if kind < 0.55:
        points = _on_circle(3)
    elif kind < 0.8:  # isosceles
        half, top = rng.uniform(0.5, 0.95), rng.uniform(-1.0, -0.6)
        points = np.array([[0, top], [half, 0.75], [-half, 0.75]])
    else:  # right-angled
        points = np.array([[-0.8, -0.8], [0.8, 0.75], [-0.8, 0.75]]) * [rng.choice([-1, 1]), 1]
    turn = rng.random()
    if turn < 0.5:
        return points
    return _rotated(points, 180 if turn < 0.6 else rng.uniform(0, 360))


def _star(rng: np.random.Generator) -> np.ndarray:
    corners = 5 if rng.random() < 0.8 else int(rng.choice([4, 6]))
    inner = rng.uniform(0.36, 0.52) if corners == 5 else rng.uniform(0.36, 0.45)
    if corners == 5 and rng.random() < 0.3:
        inner = 0.382  # the regular pentagram
    points = np.empty((2 * corners, 2))
    points[0::2] = _on_circle(corners)
    points[1::2] = inner * _on_circle(corners, -90 + 180 / corners)
    return points if rng.random() < 0.6 else _rotated(points, rng.uniform(0, 360))


def _cross(rng: np.random.Generator) -> np.ndarray:
    w, e = rng.uniform(0.14, 0.36), 0.95
    points = np.array(
        [
            [-w, -e],
            [w, -e],
            [w, -w],
            [e, -w],
            [e, w],
            [w, w],
            [w, e],
            [-w, e],
            [-w, w],
            [-e, w],
            [-e, -w],
            [-w, -w],
        ]
    )
    turn = rng.random()
    return points if turn < 0.6 else _rotated(points, 45 if turn < 0.8 else rng.uniform(0, 90))


_POLYGONS = {"square": _square, "triangle": _triangle, "star": _star, "cross": _cross}


def shape_masks(
    shape: str, radius: float, smooth: bool, rng: np.random.Generator
) -> tuple[Image.Image, Image.Image, Image.Image | None]:
    """Draw one shape inside a circle of `radius` pixels.

    Returns:
        (mask, hull, outline): "L" images of one size with the shape in the center. hull also covers
        a ring's hole. outline is a stroke along the edge, usually None.
    """
    if shape not in SHAPES:
        raise ValueError(f"shape must be one of {SHAPES}, got {shape!r}")
    over = (4 if radius < 60 else 2) if smooth else 1
    size = 2 * math.ceil(radius) + 2
    center, r = size * over / 2, radius * over
    mask = Image.new("L", (size * over, size * over), 0)
    draw = ImageDraw.Draw(mask)
    stroke = max(1.0, radius * rng.uniform(0.05, 0.12)) * over if rng.random() < 0.25 else 0.0
    outline = None
    if stroke:
        outline = Image.new("L", mask.size, 0)
        pen = ImageDraw.Draw(outline)
    hull = mask
    if shape in ("circle", "ring"):
        box = (center - r, center - r, center + r - 1, center + r - 1)
        draw.ellipse(box, fill=255)
        if shape == "ring":
            hull = mask.copy()
            inner = r * rng.uniform(0.45, 0.82)
            draw.ellipse(
                (center - inner, center - inner, center + inner - 1, center + inner - 1), fill=0
            )
            outline = None
        elif outline is not None:
            pen.ellipse(box, outline=255, width=max(1, round(stroke)))
    else:
        points = _POLYGONS[shape](rng) * r + center
        corners = [tuple(p) for p in points.tolist()]
        draw.polygon(corners, fill=255)
        if outline is not None:
            pen.line(
                [*corners, corners[0], corners[1]],
                fill=255,
                width=max(1, round(stroke)),
                joint="curve",
            )
    if over > 1:
        small = (size, size)
        hull_small = hull.resize(small, Image.Resampling.BOX)
        mask = hull_small if hull is mask else mask.resize(small, Image.Resampling.BOX)
        return (
            mask,
            hull_small,
            None if outline is None else outline.resize(small, Image.Resampling.BOX),
        )
    return mask, hull, outline


@cache
def _font_files() -> tuple[str, ...]:
    """matplotlib's DejaVu fonts, so that every machine draws the same letters."""
    import matplotlib

    folder = Path(matplotlib.__file__).parent / "mpl-data" / "fonts" / "ttf"
    names = (
        "DejaVuSans",
        "DejaVuSans-Bold",
        "DejaVuSansMono",
        "DejaVuSansMono-Bold",
        "DejaVuSerif",
        "DejaVuSerif-Bold",
    )
    return tuple(str(folder / f"{name}.ttf") for name in names)


@cache
def _font(index: int, size: int) -> ImageFont.FreeTypeFont:
    files = _font_files()
    return (
        ImageFont.load_default(size)
        if index >= len(files)
        else ImageFont.truetype(files[index], size)
    )


def text_mask(
    text: str, height: int, rng: np.random.Generator
) -> tuple[Image.Image, list[tuple[float, float, float, float]]]:
    """Draw `text` in a font of about `height` pixels.

    Returns:
        (mask, boxes): an "L" image cropped to the ink, and (left, top, right, bottom) of each
        character in it, in pixels.
    """
    font = _font(int(rng.integers(len(_font_files()) + 2)), max(8, height))
    left, top, right, bottom = font.getbbox(text)
    mask = Image.new("L", (int(right - left) + 2, int(bottom - top) + 2), 0)
    ImageDraw.Draw(mask).text((1 - left, 1 - top), text, fill=255, font=font)
    edges = [font.getlength(text[:i]) - left + 1 for i in range(len(text) + 1)]
    boxes = [(edges[i], 0.0, edges[i + 1], float(mask.height)) for i in range(len(text))]
    return mask, boxes
