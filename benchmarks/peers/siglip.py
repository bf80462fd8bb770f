"""What workers of SigLIP on torch have in common."""

import time
from collections.abc import Callable
from typing import Any

import torch


def encoding(model: Any, dtype: torch.dtype) -> Callable[[int], dict]:
    """The action `encode`: random images to pooled features; images count as tokens."""

    @torch.inference_mode()
    def encode(images: int) -> dict:
        size = model.config.image_size
        pixels = torch.randn(images, 3, size, size, dtype=dtype)
        start = time.perf_counter()
        model(pixels)
        return {"seconds": time.perf_counter() - start, "tokens": images}

    return encode
