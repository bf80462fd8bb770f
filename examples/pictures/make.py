"""Draw the demo's two images: shapes on white, and shapes on a photograph (needs scikit-image).

The photograph is Chelsea the cat by Stefan van der Walt (CC0), from scikit-image. The embedded
model was not trained on it.
"""

import math
from pathlib import Path

from PIL import Image, ImageDraw
from skimage import data

HERE = Path(__file__).parent
OVERSAMPLING = 4  # shapes are drawn this many times larger and reduced, for smooth edges


def polygon(
    corners: int, x: float, y: float, radius: float, inner: float = 1.0
) -> list[tuple[float, float]]:
    """Corners on a circle, starting at the top. With `inner` below 1, a star."""
    count = corners if inner == 1 else 2 * corners
    radii = [radius * (inner if inner != 1 and i % 2 else 1) for i in range(count)]
    angles = [2 * math.pi * i / count - math.pi / 2 for i in range(count)]
    return [(x + r * math.cos(a), y + r * math.sin(a)) for r, a in zip(radii, angles, strict=True)]


def draw(
    background: Image.Image, shapes: list[tuple[str, str, float, float, float]]
) -> Image.Image:
    """Draw (shape, color, x, y, radius) on a background, in pixels."""
    large = background.resize(
        [OVERSAMPLING * side for side in background.size], Image.Resampling.BICUBIC
    )
    pen = ImageDraw.Draw(large)
    for shape, color, *place in shapes:
        x, y, radius = (OVERSAMPLING * value for value in place)
        if shape == "circle":
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=color)
        elif shape == "square":
            pen.rectangle((x - radius, y - radius, x + radius, y + radius), fill=color)
        else:
            pen.polygon(
                polygon(
                    {"triangle": 3, "star": 5}[shape],
                    x,
                    y,
                    radius,
                    0.45 if shape == "star" else 1.0,
                ),
                fill=color,
            )
    return large.resize(background.size, Image.Resampling.BOX)


if __name__ == "__main__":
    white = Image.new("RGB", (320, 240), "white")
    shapes = [
        ("circle", "red", 62, 122, 40),
        ("star", "blue", 164, 52, 46),
        ("triangle", "green", 258, 132, 44),
    ]
    draw(white, shapes).save(HERE / "drawn.png", optimize=True)
    photograph = Image.fromarray(data.chelsea())
    draw(photograph, [("square", "blue", 62, 150, 42), ("star", "red", 394, 190, 52)]).save(
        HERE / "photograph.jpg", quality=88
    )
