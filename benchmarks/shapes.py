"""Benchmark sizes: Llama-3.2-1B's decoder and SigLIP-base's encoder (224 pixels, patches of 16)."""

from typing import Any

HIDDEN, HEADS, KV_HEADS, HEAD_SIZE, FFN = 2048, 32, 8, 64, 8192
VOCABULARY = 128256
TEXT_LENGTHS = (1, 512)  # one decoding step, one prefill

VISION_HIDDEN, VISION_HEADS, VISION_FFN = 768, 12, 3072
IMAGE, PATCH, PATCHES = 224, 16, 196
VISION_BATCHES = (1, 8)


def use(**sizes: Any) -> None:
    """Change sizes, by name."""
    assert sizes.keys() <= globals().keys()
    globals().update(sizes)


def text(width: int) -> list[tuple[int, int, int]]:
    """[B, T, width] for each text length."""
    return [(1, length, width) for length in TEXT_LENGTHS]


def vision(width: int) -> list[tuple[int, int, int]]:
    """[B, patches, width] for each batch of images."""
    return [(batch, PATCHES, width) for batch in VISION_BATCHES]


def label(shape: tuple[int, ...]) -> str:
    """A shape as a string: 1x512x2048."""
    return "x".join(map(str, shape))
