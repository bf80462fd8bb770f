"""Images of the same shapes drawn by matplotlib, to check that the model did not just learn the
generator.
"""

from __future__ import annotations

import numpy as np
from PIL import Image

from .drawing import SHAPES
from .evaluation import Case
from .palette import COLORS
from .questions import ask
from .scene import POSITIONS, Scene, Thing, _place

GRAYS = (
    "white",
    "white",
    "white",
    "whitesmoke",
    "lightgrey",
    "dimgrey",
    "lightblue",
    "beige",
    "black",
    "navy",
)
UNSEEN_ON = {
    "white": ("white", "whitesmoke", "beige"), "black": ("black", "navy", "dimgrey"),
        "blue": ("navy", "lightblue"), "purple": ("navy",),
    "brown": ("dimgrey",), "yellow": ("beige",), "pink": ("lightgrey", "beige", "lightblue"),
        "green": ("dimgrey",),
}  # fmt: skip


def _patch(shape: str, color: str, x: float, y: float, r: float, rng: np.random.Generator):
    from matplotlib import patches

    edge = {
        "facecolor": color,
        "edgecolor": "black" if rng.random() < 0.3 else color,
        "linewidth": 1,
    }
    turn = 0.0 if rng.random() < 0.6 else rng.uniform(0, 2 * np.pi)
    if shape == "circle":
        return patches.Circle((x, y), r, **edge)
    if shape == "square":
        return patches.Rectangle(
            (x - 0.8 * r, y - 0.8 * r),
            1.6 * r,
            1.6 * r,
            angle=rng.uniform(-15, 15),
            rotation_point="center",
            **edge,
        )
    if shape == "triangle":
        return patches.RegularPolygon((x, y), 3, radius=r, orientation=turn, **edge)
    if shape == "ring":
        if rng.random() < 0.5:
            return patches.Annulus((x, y), r, r * rng.uniform(0.2, 0.45), color=color)
        return patches.Circle(
            (x, y), r * 0.9, fill=False, edgecolor=color, linewidth=float(rng.uniform(4, 8))
        )
    if shape == "star":
        angles = np.pi / 2 + np.pi / 5 * np.arange(10) + turn
        lengths = np.where(np.arange(10) % 2 == 0, r, r * rng.uniform(0.38, 0.5))
        return patches.Polygon(
            np.stack([x + lengths * np.cos(angles), y + lengths * np.sin(angles)], 1), **edge
        )
    w = rng.uniform(0.15, 0.33) * r
    corners = np.array(
        [
            [-w, -r],
            [w, -r],
            [w, -w],
            [r, -w],
            [r, w],
            [w, w],
            [w, r],
            [-w, r],
            [-w, w],
            [-r, w],
            [-r, -w],
            [-w, -w],
        ]
    )
    if turn:
        corners = corners @ np.array([[1, 1], [-1, 1]]) / np.sqrt(2)
    return patches.Polygon(corners + [x, y], **edge)


def matplotlib_case(number: int, turns: int = 8) -> Case:
    """Image `number`: one to six shapes in CSS colors on a plain background, drawn by matplotlib's
    Agg renderer.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rng = np.random.default_rng([77, number])
    ground = GRAYS[rng.integers(len(GRAYS))]
    width, height = (4.0, 3.0) if rng.random() < 0.4 else (3.0, 3.0)
    figure = Figure(figsize=(width, height), dpi=int(rng.integers(50, 110)), facecolor=ground)
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.set_axis_off()
    objects, taken = [], []
    count = int(rng.choice([1, 2, 3, 4, 5, 6], p=[0.3, 0.27, 0.23, 0.1, 0.05, 0.05]))
    colors = [color for color in COLORS if ground not in UNSEEN_ON.get(color, ())]
    for _ in range(count):
        for _ in range(30):
            shape, color, r = (
                SHAPES[rng.integers(6)],
                colors[rng.integers(len(colors))],
                rng.uniform(0.3, 0.75 if count < 4 else 0.45),
            )
            u, v = _place(POSITIONS[rng.integers(5)] if rng.random() < 0.6 else None, rng)
            x, y = (
                float(np.clip(u * width, r, width - r)),
                float(np.clip((1 - v) * height, r, height - r)),
            )
            if all((x - a) ** 2 + (y - b) ** 2 > (1.15 * (r + c)) ** 2 for a, b, c in taken):
                axes.add_patch(_patch(shape, color, x, y, r, rng))
                taken.append((x, y, r))
                objects.append(Thing(shape, color, x / width, 1 - y / height, np.zeros((1, 1))))
                break
    objects.sort(key=lambda thing: thing.x)
    canvas.draw()
    image = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())
    scene = Scene(image, objects, None, "flat")
    return Case(image, ask(scene, rng, turns, describe=1.0), len(objects))
