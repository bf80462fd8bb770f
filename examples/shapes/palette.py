"""The ten color names and their RGB values."""

from __future__ import annotations

import numpy as np

# The first entry is the CSS color of that name and is drawn most often. The others come from
# matplotlib's cycle and flat user-interface palettes. Ambiguous values are left out.
PALETTE: dict[str, list[tuple[int, int, int]]] = {
    "red": [(255, 0, 0), (220, 20, 60), (214, 39, 40), (231, 30, 30), (205, 0, 0), (240, 50, 45)],
    "orange": [
        (255, 165, 0),
        (255, 140, 0),
        (255, 127, 14),
        (255, 120, 0),
        (243, 146, 18),
        (250, 130, 40),
    ],
    "yellow": [
        (255, 255, 0),
        (255, 235, 59),
        (250, 245, 80),
        (255, 225, 20),
        (241, 215, 15),
        (240, 240, 40),
    ],
    "green": [
        (0, 128, 0),
        (0, 255, 0),
        (34, 139, 34),
        (44, 160, 44),
        (46, 204, 113),
        (50, 205, 50),
        (0, 100, 0),
        (60, 179, 113),
    ],
    "blue": [
        (0, 0, 255),
        (31, 119, 180),
        (30, 144, 255),
        (65, 105, 225),
        (0, 0, 160),
        (52, 140, 219),
        (0, 80, 205),
        (70, 130, 200),
    ],
    "purple": [
        (128, 0, 128),
        (148, 103, 189),
        (138, 43, 226),
        (155, 80, 182),
        (106, 13, 173),
        (153, 50, 204),
        (102, 51, 153),
    ],
    "pink": [
        (255, 192, 203),
        (255, 105, 180),
        (227, 119, 194),
        (255, 182, 193),
        (244, 143, 177),
        (255, 130, 190),
    ],
    "brown": [
        (165, 42, 42),
        (139, 69, 19),
        (140, 86, 75),
        (121, 85, 72),
        (160, 82, 45),
        (101, 67, 33),
        (150, 75, 0),
    ],
    "black": [(0, 0, 0), (15, 15, 15), (30, 30, 30)],
    "white": [(255, 255, 255), (248, 248, 248), (255, 255, 255)],
}
COLORS = list(PALETTE)


def shade(name: str, rng: np.random.Generator) -> tuple[int, int, int]:
    """A random RGB value of a color: the CSS value in 40% of cases, else a variant; half of them
    slightly jittered.
    """
    choices = PALETTE[name]
    base = choices[0] if rng.random() < 0.4 else choices[rng.integers(len(choices))]
    if rng.random() < 0.5:
        return base
    jitter = rng.integers(-10, 11, size=3)
    red, green, blue = np.clip(np.asarray(base) + jitter, 0, 255).tolist()
    return red, green, blue


def contrast(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Perceptual distance of two RGB colors, 0 to about 765 ("redmean"). Inputs: [..., 3] in
    0..255.
    """
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    mean_red = (a[..., 0] + b[..., 0]) / 2
    d = (a - b) ** 2
    return np.sqrt(
        (2 + mean_red / 256) * d[..., 0] + 4 * d[..., 1] + (2 + (255 - mean_red) / 256) * d[..., 2]
    )
