"""Dense labels of every patch, on which the vision encoder is trained."""

from __future__ import annotations

import numpy as np

from .drawing import SHAPES
from .palette import COLORS
from .scene import POSITIONS, Scene
from .words import CHARACTERS

# Heads of the auxiliary loss: name -> number of classes. Class 0 is "nothing here" where that
# applies.
HEADS: dict[str, int] = {
    "shape": 2 + len(SHAPES),  # nothing, the six shapes, text
    "color": 1 + len(COLORS),  # nothing, the ten colors
    "position": 1 + len(POSITIONS),  # of the whole object; the last class is "no clear position"
    "objects": 7,  # in the whole image, the same for every patch
    "same_color": 7,  # objects of this object's color
    "same_shape": 7,
    "rank": 6,  # from the left
    "center": 2,  # the object's center lies in this patch
    "character": 1 + len(CHARACTERS),
    "place": 6,  # of the character in its text
}
IGNORE = -100
OFFSETS = 2  # regression targets: offset to the object's center, in quarters of the image
SILHOUETTE = 64  # and the coverage of the whole object, 8 x 8


def dense_labels(scene: Scene, grid: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """Labels of every patch of a scene.

    Returns:
        (classes, numbers): int16 [grid * grid, len(HEADS)], IGNORE where a label does not apply,
        and float32 [grid * grid, OFFSETS + SILHOUETTE], NaN outside objects.
    """
    names = list(HEADS)
    classes = np.full((grid, grid, len(names)), IGNORE, np.int16)
    offsets = np.full((grid, grid, OFFSETS + SILHOUETTE), np.nan, np.float32)
    put = {name: i for i, name in enumerate(names)}
    for name in ("shape", "color", "center", "character"):
        classes[..., put[name]] = 0
    classes[..., put["objects"]] = len(scene.objects)
    things = scene.objects + ([scene.text] if scene.text is not None else [])
    if things:
        stack = np.stack([thing.coverage for thing in things])
        # A patch belongs to the object that covers most of it; an object's center patch is always
        # its own.
        owner = np.where(stack.max(0) > 0.25, stack.argmax(0), -1)
        edge = (stack.max(0) > 0.02) & (owner < 0)
        middle = (np.arange(grid) + 0.5) / grid
        for i, thing in enumerate(things):
            mine = owner == i
            row, column = min(grid - 1, int(thing.y * grid)), min(grid - 1, int(thing.x * grid))
            if thing.shape != "text":
                mine[row, column] = True
            same_color = sum(other.color == thing.color for other in scene.objects)
            same_shape = sum(other.shape == thing.shape for other in scene.objects)
            is_text = thing.shape == "text"
            position = thing.position
            values = {
                "shape": 7 if is_text else 1 + SHAPES.index(thing.shape),
                "color": 1 + COLORS.index(thing.color),
                "position": POSITIONS.index(position) if position else len(POSITIONS),
            }
            if not is_text:
                values |= {"same_color": same_color, "same_shape": same_shape, "rank": i}
            for name, value in values.items():
                classes[..., put[name]][mine] = value
            offsets[mine, 0] = ((thing.x - middle)[None, :] * np.ones((grid, 1)))[mine] * 4
            offsets[mine, 1] = ((thing.y - middle)[:, None] * np.ones((1, grid)))[mine] * 4
            if thing.silhouette is not None:
                offsets[mine, OFFSETS:] = thing.silhouette.reshape(-1)
            if not is_text:
                classes[row, column, put["center"]] = 1
            else:
                _characters(thing, classes, put, grid)
        for name in ("shape", "color"):  # ignore patches that an object barely touches
            plane = classes[..., put[name]]
            plane[edge & (plane == 0)] = IGNORE
    return classes.reshape(grid * grid, len(names)), offsets.reshape(
        grid * grid, OFFSETS + SILHOUETTE
    )


def _characters(thing, classes, put, grid) -> None:
    edges = np.arange(grid + 1) / grid
    best = np.zeros((grid, grid), np.float32)
    for place, (box, character) in enumerate(
        zip(thing.character_boxes, thing.text.lower(), strict=True)
    ):
        left, top, right, bottom = box
        across = (
            np.clip(np.minimum(right, edges[1:]) - np.maximum(left, edges[:-1]), 0, None) * grid
        )
        down = np.clip(np.minimum(bottom, edges[1:]) - np.maximum(top, edges[:-1]), 0, None) * grid
        share = down[:, None] * across[None, :]
        row, column = (
            min(grid - 1, int((top + bottom) / 2 * grid)),
            min(grid - 1, int((left + right) / 2 * grid)),
        )
        share[row, column] += 0.3  # the center patch is labeled even if the character is thin
        mine = (share > 0.3) & (share > best)
        best[mine] = share[mine]
        classes[..., put["character"]][mine] = 1 + CHARACTERS.index(character)
        classes[..., put["place"]][mine] = min(place, 5)
