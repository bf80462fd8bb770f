"""Backgrounds: flat colors, noise, gradients and crops of scikit-image's sample photographs."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

# Included in scikit-image's wheel, so no download is needed. DEMO_PHOTOS and HELD_OUT_PHOTOS are
# never trained on.
TRAINING_PHOTOS = (
    "astronaut.png", "rocket.jpg", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
    "retina.jpg",
    "brick.png", "grass.png", "gravel.png", "camera.png", "moon.png",
)  # fmt: skip
DEMO_PHOTOS = ("chelsea.png",)
HELD_OUT_PHOTOS = ("coffee.png",)
KINDS = ("flat", "noise", "gradient", "photo")


@cache
def photo(name: str) -> Image.Image:
    """A sample photograph as RGB, at most 480 pixels on its longer side."""
    import skimage

    with Image.open(Path(skimage.__file__).parent / "data" / name) as opened:
        image = opened.convert("RGB")
    image.thumbnail((480, 480))
    return image


def _color(rng: np.random.Generator) -> np.ndarray:
    """A background color: often white or light, sometimes dark or saturated."""
    draw = rng.random()
    if draw < 0.3:
        return np.array([255, 255, 255])
    if draw < 0.6:
        return rng.integers(200, 256) + rng.integers(-20, 1, size=3)
    if draw < 0.7:
        return rng.integers(0, 60) + rng.integers(0, 20, size=3)
    if draw < 0.85:
        return np.repeat(rng.integers(0, 256), 3)
    return rng.integers(0, 256, size=3)


def background(
    kind: str,
    width: int,
    height: int,
    rng: np.random.Generator,
    photos: tuple[str, ...] = TRAINING_PHOTOS,
) -> Image.Image:
    """An RGB image of one of `KINDS`."""
    if kind == "flat":
        return Image.new(
            "RGB", (width, height), tuple(int(v) for v in np.clip(_color(rng), 0, 255))
        )
    if kind == "noise":
        step = int(rng.integers(1, 5))  # coarse noise is drawn small and upscaled
        small = (height // step + 1, width // step + 1, 3 if rng.random() < 0.5 else 1)
        noise = rng.normal(0, rng.uniform(4, 28), size=small).astype(np.float32)
        pixels = np.broadcast_to(np.clip(_color(rng) + noise, 0, 255), (*small[:2], 3)).astype(
            np.uint8
        )
        image = Image.fromarray(pixels)
        return (
            image
            if step == 1 and image.size == (width, height)
            else image.resize((width, height), Image.Resampling.BILINEAR)
        )
    if kind == "gradient":
        corners = np.clip(np.stack([_color(rng) for _ in range(4)]), 0, 255).reshape(2, 2, 3)
        if rng.random() < 0.6:  # along one axis
            corners = (
                np.repeat(corners[:1], 2, axis=0)
                if rng.random() < 0.5
                else np.repeat(corners[:, :1], 2, axis=1)
            )
        y, x = (
            np.linspace(0, 1, height, dtype=np.float32)[:, None, None],
            np.linspace(0, 1, width, dtype=np.float32)[None, :, None],
        )
        left = corners[0, 0] * (1 - y) + corners[1, 0] * y
        right = corners[0, 1] * (1 - y) + corners[1, 1] * y
        return Image.fromarray((left * (1 - x) + right * x).astype(np.uint8))
    if kind == "photo":
        source = photo(photos[rng.integers(len(photos))])
        scale = rng.uniform(0.35, 1.0)
        crop_w, crop_h = max(16, int(source.width * scale)), max(16, int(source.height * scale))
        x, y = (
            int(rng.integers(0, source.width - crop_w + 1)),
            int(rng.integers(0, source.height - crop_h + 1)),
        )
        crop = source.resize(
            (width, height), Image.Resampling.BILINEAR, box=(x, y, x + crop_w, y + crop_h)
        )
        if rng.random() < 0.5:
            crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        return crop
    raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
