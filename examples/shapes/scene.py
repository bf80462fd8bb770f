"""Generate one image with its objects and text."""

from __future__ import annotations

import io
from dataclasses import dataclass, field

import numpy as np
from PIL import Image, ImageFilter

from .backgrounds import HELD_OUT_PHOTOS, KINDS, TRAINING_PHOTOS, background
from .drawing import SHAPES, shape_masks, text_mask
from .palette import COLORS, contrast, shade
from .words import random_text

POSITIONS = ("left", "right", "top", "bottom", "center")


@dataclass
class Thing:
    """An object or a text in an image. Positions and boxes are fractions of width and height."""

    shape: str  # one of SHAPES, or "text"
    color: str
    x: float
    y: float
    coverage: np.ndarray  # float [grid, grid]: coverage of every patch by its hull
    silhouette: np.ndarray | None = None  # float [8, 8]: the object's mask, cropped and scaled
    text: str = ""
    character_boxes: list[tuple[float, float, float, float]] = field(default_factory=list)

    @property
    def position(self) -> str | None:
        """One of POSITIONS, or None if ambiguous: near a diagonal or between two regions."""
        return position_name(self.x, self.y)


@dataclass
class Scene:
    """A finished image with its objects (left to right) and at most one text."""

    image: Image.Image
    objects: list[Thing]
    text: Thing | None
    background: str


@dataclass
class Recipe:
    """Difficulty of the images. The curriculum varies it; the defaults are the final mixture."""

    counts: tuple[float, ...] = (0.26, 0.24, 0.2, 0.1, 0.1, 0.1)  # one to six objects
    backgrounds: tuple[float, ...] = (0.5, 0.15, 0.15, 0.2)  # in the order of KINDS
    text_only: float = 0.06
    text_beside: float = 0.05
    smallest: float = 0.09  # radius of an object, as a fraction of the shorter side
    random_text: float = 0.5  # fraction of words with random letters
    photos: tuple[str, ...] = TRAINING_PHOTOS


HELD_OUT = Recipe(
    backgrounds=(0.5, 0.15, 0.15, 0.2),
    text_only=0.12,
    text_beside=0.06,
    photos=TRAINING_PHOTOS + HELD_OUT_PHOTOS * 4,
)


def position_name(x: float, y: float) -> str | None:
    """Name of a place in the image, or None if ambiguous."""
    u, v = x - 0.5, y - 0.5
    a, b = abs(u), abs(v)
    if max(a, b) < 0.11:
        return "center"
    if max(a, b) < 0.18 or max(a, b) < 1.4 * min(a, b):
        return None
    if a > b:
        return "left" if u < 0 else "right"
    return "top" if v < 0 else "bottom"


def _place(region: str | None, rng: np.random.Generator) -> tuple[float, float]:
    """A random center in 0..1, inside the region if given."""
    if region is None:
        return rng.random(), rng.random()
    if region == "center":
        return 0.5 + rng.uniform(-0.1, 0.1), 0.5 + rng.uniform(-0.1, 0.1)
    along, across = rng.uniform(0.2, 0.42), 0.0
    across = rng.uniform(-0.68, 0.68) * along
    return {
        "left": (0.5 - along, 0.5 + across), "right": (0.5 + along, 0.5 + across),
        "top": (0.5 + across, 0.5 - along), "bottom": (0.5 + across, 0.5 + along),
    }[region]  # fmt: skip


def _coverage(
    mask: Image.Image, left: int, top: int, size: tuple[int, int], grid: int
) -> np.ndarray:
    full = Image.new("L", size, 0)
    full.paste(mask, (left, top))
    return np.asarray(full.resize((grid, grid), Image.Resampling.BOX), np.float32) / 255


def _visible(rgb: tuple[int, int, int], behind: np.ndarray, inside: np.ndarray) -> bool:
    """Whether a color stands out from its background."""
    pixels = behind[inside]
    if not len(pixels):
        return False
    distance = contrast(pixels, np.asarray(rgb))
    return bool(distance.mean() > 150 and (distance < 90).mean() < 0.15)


def make_scene(rng: np.random.Generator, recipe: Recipe | None = None, grid: int = 12) -> Scene:
    """Draw one image.

    Args:
        rng: source of every choice; the same seed gives the same image.
        recipe: the mixture. Default: the final one.
        grid: patches per side, for the dense labels.
    """
    recipe = recipe or Recipe()
    short = int(np.exp(rng.uniform(np.log(80), np.log(240))))
    aspect = 1.0 if rng.random() < 0.4 else float(np.exp(rng.uniform(0, np.log(1.8))))
    width, height = (
        (round(short * aspect), short) if rng.random() < 0.6 else (short, round(short * aspect))
    )
    kind = KINDS[rng.choice(4, p=recipe.backgrounds)]
    canvas = background(kind, width, height, rng, recipe.photos)
    smooth = rng.random() < 0.75
    draw = rng.random()
    only_text, beside = (
        draw < recipe.text_only,
        recipe.text_only <= draw < recipe.text_only + recipe.text_beside,
    )
    count = 0 if only_text else 1 + int(rng.choice(6, p=recipe.counts))
    if beside:
        count = min(count, 3)
    taken: list[tuple[float, float, float, float]] = []  # occupied boxes, in pixels
    text = _add_text(canvas, taken, only_text, grid, rng, recipe) if only_text or beside else None
    limit = {0: 0.3, 1: 0.36, 2: 0.26, 3: 0.22}.get(count, 0.18)
    same = rng.random()  # some images repeat a shape or a color, to train counting
    shapes = [SHAPES[i] for i in rng.integers(6, size=count)]
    colors = [COLORS[i] for i in rng.integers(10, size=count)]
    if count > 1 and same < 0.2:
        shapes = [shapes[0] if rng.random() < 0.6 else s for s in shapes]
    elif count > 1 and same < 0.4:
        colors = [colors[0] if rng.random() < 0.6 else c for c in colors]
    objects = []
    for shape, color in zip(shapes, colors, strict=True):
        thing = _add_object(canvas, taken, shape, color, smooth, limit, grid, rng, recipe)
        if thing is not None:
            objects.append(thing)
    if not objects and text is None:
        return make_scene(rng, recipe, grid)
    objects.sort(key=lambda thing: thing.x)
    return Scene(_finish(canvas, rng), objects, text, kind)


def _add_object(canvas, taken, shape, color, smooth, limit, grid, rng, recipe) -> Thing | None:
    width, height = canvas.size
    short = min(width, height)
    for attempt in range(24):
        radius = short * rng.uniform(
            recipe.smallest, max(limit * (1 - attempt / 40), recipe.smallest + 0.02)
        )
        if shape in ("star", "ring", "cross"):
            radius = max(radius, 0.11 * short)
        x, y = _place(POSITIONS[rng.integers(5)] if rng.random() < 0.6 else None, rng)
        cx = float(np.clip(x * width, radius + 1, width - radius - 1))
        cy = float(np.clip(y * height, radius + 1, height - radius - 1))
        if any(
            cx + radius > l and cx - radius < r and cy + radius > t and cy - radius < b
            for l, t, r, b in taken  # noqa: E741
        ):
            continue
        if attempt % 6 == 5:
            color = COLORS[rng.integers(10)]
        rgb = shade(color, rng)
        mask, hull, outline = shape_masks(shape, radius, smooth, rng)
        left, top = round(cx - mask.width / 2), round(cy - mask.height / 2)
        box = (left, top, left + mask.width, top + mask.height)
        behind = np.asarray(canvas.crop(box))[::2, ::2]
        if not _visible(rgb, behind, np.ones(behind.shape[:2], bool)):
            continue
        canvas.paste(rgb, box, mask)
        if outline is not None:
            ink = (
                (0, 0, 0)
                if color != "black" and rng.random() < 0.6
                else tuple(int(v * 0.6) for v in rgb)
            )
            canvas.paste(ink, box, outline)
        gap = 0.03 * short
        taken.append((cx - radius - gap, cy - radius - gap, cx + radius + gap, cy + radius + gap))
        silhouette = np.asarray(mask.resize((8, 8), Image.Resampling.BOX), np.float32) / 255
        return Thing(
            shape,
            color,
            cx / width,
            cy / height,
            _coverage(hull, left, top, canvas.size, grid),
            silhouette,
        )
    return None


def _add_text(canvas, taken, alone, grid, rng, recipe) -> Thing | None:
    width, height = canvas.size
    text = random_text(rng, recipe.random_text)
    wide = (
        width
        * (rng.uniform(0.5, 0.92) if alone else rng.uniform(0.4, 0.7))
        * min(1.0, (len(text) + 1.2) / 5)
    )
    mask, boxes = text_mask(
        text,
        max(10, min(int(wide / (0.62 * len(text))), int(height * (0.8 if alone else 0.35)))),
        rng,
    )
    if mask.width > width * 0.96 or mask.height > height * 0.96:
        scale = min(width * 0.96 / mask.width, height * 0.96 / mask.height)
        boxes = [tuple(v * scale for v in box) for box in boxes]
        mask = mask.resize(
            (max(1, int(mask.width * scale)), max(1, int(mask.height * scale))),
            Image.Resampling.BILINEAR,
        )
    left = int(rng.integers(0, width - mask.width + 1))
    top = int(rng.integers(0, height - mask.height + 1))
    box = (left, top, left + mask.width, top + mask.height)
    behind = np.asarray(canvas.crop(box))[::2, ::2]
    everywhere = np.ones(behind.shape[:2], bool)
    dark = behind.mean() < 110
    for attempt in range(12):
        color = (
            ("white" if dark else "black")
            if attempt == 0 and rng.random() < 0.6
            else COLORS[rng.integers(10)]
        )
        rgb = shade(color, rng)
        if _visible(rgb, behind, everywhere):
            break
    else:
        plate = (
            (255, 255, 255) if rng.random() < 0.7 else (0, 0, 0)
        )  # background behind the letters
        canvas.paste(plate, (left - 3, top - 3, box[2] + 3, box[3] + 3))
        color, rgb = ("black", (0, 0, 0)) if plate[0] else ("white", (255, 255, 255))
    canvas.paste(rgb, box, mask)
    taken.append((left - 2, top - 2, box[2] + 2, box[3] + 2))
    places = [
        ((left + l) / width, (top + t) / height, (left + r) / width, (top + b) / height)
        for l, t, r, b in boxes  # noqa: E741
    ]
    solid = Image.new("L", mask.size, 255)
    x, y = (left + mask.width / 2) / width, (top + mask.height / 2) / height
    return Thing(
        "text", color, x, y, _coverage(solid, left, top, canvas.size, grid), None, text, places
    )


def _finish(canvas: Image.Image, rng: np.random.Generator) -> Image.Image:
    """Random degradation: slight blur, JPEG compression."""
    if rng.random() < 0.15:
        canvas = canvas.filter(
            ImageFilter.GaussianBlur(float(rng.uniform(0.3, 1.1)) * min(canvas.size) / 160)
        )
    if rng.random() < 0.4:
        file = io.BytesIO()
        canvas.save(file, "JPEG", quality=int(rng.integers(55, 98)))
        canvas = Image.open(file)
        canvas.load()
    return canvas
