"""Batches of generated images, made in worker processes during training."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, IterableDataset

from .labels import HEADS, IGNORE, dense_labels
from .questions import KINDS, Turn, ask
from .scene import HELD_OUT, Recipe, Scene, make_scene
from .tokenizer import build_tokenizer

# Yes/no questions carry one bit and are learned last, so training asks them more often than the
# evaluation.
TRAINING_WEIGHTS = {"color": 0.2, "shape": 0.2, "where": 0.2, "exists": 0.3, "count": 0.1}
HELD_OUT_SEED = (
    1 << 40
)  # images of the evaluation are numbered from here; training never comes that far


@dataclass
class Batch:
    """One training batch.

    pixels: uint8 [B, S, S, 3]. classes: int64 [B, patches, heads]. offsets: f32 [B, patches, 66]
    (NaN: none).
    input_ids, labels: int64 [B, T], right padded, the placeholders included; labels are -100 except
    on answers and <eos>.
    """

    pixels: torch.Tensor
    classes: torch.Tensor
    offsets: torch.Tensor
    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor


def image_rng(seed: int, number: int) -> np.random.Generator:
    """Random generator of one image, the same on every machine."""
    return np.random.default_rng([seed, number])


def pixels_of(image: Image.Image, size: int) -> np.ndarray:
    """uint8 [size, size, 3], resized with Pillow's bicubic filter as in the processor."""
    return np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))


def encode_turns(
    turns: list[Turn], tokenizer, patches: int, limit: int
) -> tuple[list[int], list[int]]:
    """Ids and labels of one conversation: placeholders, then question, newline, answer and <eos> of
    every turn that fits.
    """
    ids, labels = [tokenizer.convert_tokens_to_ids("<image>")] * patches, [IGNORE] * patches
    for turn in turns:
        question = tokenizer(turn.question + "\n", add_special_tokens=False)["input_ids"]
        answer = tokenizer(turn.answer, add_special_tokens=False)["input_ids"] + [
            tokenizer.eos_token_id
        ]
        if len(ids) + len(question) + len(answer) > patches + limit and len(ids) > patches:
            continue
        ids += question + answer
        labels += [IGNORE] * len(question) + answer
    return ids, labels


def curriculum(progress: float) -> Recipe:
    """From one or two large objects on plain backgrounds to the final mixture, which is reached
    after a third of training.
    """
    full = Recipe()
    t = min(1.0, max(0.0, progress) / 0.33)
    blend = lambda easy, hard: tuple(  # noqa: E731
        float(e + (h - e) * t) for e, h in zip(easy, hard, strict=True)
    )
    return Recipe(
        counts=blend((0.6, 0.4, 0, 0, 0, 0), full.counts),
        backgrounds=blend((0.9, 0.05, 0.05, 0), full.backgrounds),
        text_only=full.text_only,
        text_beside=full.text_beside * t,
        smallest=0.15 + (full.smallest - 0.15) * t,
    )


class ImageBatches(IterableDataset):
    """Infinite batches. Batch n depends on `seed` and n alone, so that a run resumes exactly."""

    def __init__(
        self,
        seed: int,
        batch: int,
        total: int,
        start: int = 0,
        turns: int = 14,
        size: int = 96,
        patch: int = 8,
    ) -> None:
        self.seed, self.batch, self.total, self.start, self.turns, self.size, self.patch = (
            seed,
            batch,
            total,
            start,
            turns,
            size,
            patch,
        )

    def __iter__(self) -> Iterator[Batch]:
        info = torch.utils.data.get_worker_info()
        worker, workers = (info.id, info.num_workers) if info else (0, 1)
        torch.set_num_threads(1)
        tokenizer = build_tokenizer()
        number = self.start + worker
        while True:
            yield self.make(number, tokenizer)
            number += workers

    def make(self, number: int, tokenizer) -> Batch:
        """Batch `number`."""
        recipe = curriculum(number * self.batch / self.total)
        grid = self.size // self.patch
        rows = []
        for i in range(number * self.batch, (number + 1) * self.batch):
            rng = image_rng(self.seed, i)
            scene = make_scene(rng, recipe, grid)
            turns = ask(scene, rng, self.turns, describe=0.4, weights=TRAINING_WEIGHTS)
            if (
                turns[-1].kind == "describe" and rng.random() < 0.35
            ):  # sometimes ask for a description first
                turns.insert(0, turns.pop())
            rows.append((scene, turns))
        return collate(rows, tokenizer, self.size, grid)


def collate(
    rows: list[tuple[Scene, list[Turn]]], tokenizer, size: int, grid: int, limit: int = 176
) -> Batch:
    """Combine scenes and turns into one batch."""
    pixels = torch.from_numpy(np.stack([pixels_of(scene.image, size) for scene, _ in rows]))
    dense = [dense_labels(scene, grid) for scene, _ in rows]
    classes = torch.from_numpy(np.stack([c for c, _ in dense]).astype(np.int64))
    offsets = torch.from_numpy(np.stack([o for _, o in dense]))
    encoded = [encode_turns(turns, tokenizer, grid * grid, limit) for _, turns in rows]
    longest = max(len(ids) for ids, _ in encoded)
    ids = torch.full((len(rows), longest), tokenizer.pad_token_id)
    labels = torch.full((len(rows), longest), IGNORE)
    mask = torch.zeros((len(rows), longest), dtype=torch.int64)
    for i, (row, row_labels) in enumerate(encoded):
        ids[i, : len(row)], labels[i, : len(row)], mask[i, : len(row)] = (
            torch.tensor(row),
            torch.tensor(row_labels),
            1,
        )
    return Batch(pixels, classes, offsets, ids, mask, labels)


def batches(
    seed: int, batch: int, total: int, start: int = 0, turns: int = 14, workers: int = 1, **shape
) -> Iterator[Batch]:
    """Batches in order, made by `workers` processes."""
    data = ImageBatches(seed, batch, total, start, turns, **shape)
    return iter(
        DataLoader(
            data, batch_size=None, num_workers=workers, prefetch_factor=8 if workers else None
        )
    )


def held_out(
    count: int, seed: int = 0, turns: int = 8, recipe: Recipe = HELD_OUT, grid: int = 12
) -> list[tuple[Scene, list[Turn]]]:
    """`count` images that no training run ever sees, with their questions; they may show a
    photograph that training leaves out.
    """
    rows = []
    for i in range(count):
        rng = image_rng(seed, HELD_OUT_SEED + i)
        scene = make_scene(rng, recipe, grid)
        rows.append((scene, ask(scene, rng, turns, describe=1.0)))
    return rows


__all__ = [
    "HEADS",
    "KINDS",
    "Batch",
    "ImageBatches",
    "batches",
    "collate",
    "curriculum",
    "held_out",
    "pixels_of",
]
