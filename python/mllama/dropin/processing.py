"""Image functions and processors of older scripts.

`processing_mllama` normalizes with CLIP's mean and deviation, the other two with 0.5.
"""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image

import mllama
from mllama.hf.names import BatchFeature
from mllama.hf.processors.tokenizers import fast_tokenizer
from mllama.processing import square
from mllama.processing.image import load_image
from mllama.processing.prompt import lay_out

CLIP_MEAN, CLIP_STD = list(square.CLIP_MEAN), list(square.CLIP_STD)
HALVES = [0.5, 0.5, 0.5]
_OLDER_KEYS = {"pixel Value": "pixel_values", "pixel_value": "pixel_values"}


def resize(
    image: Any, size: tuple[int, int], resample: int | None = None, reducing_gap=None
) -> Image.Image:
    """An image of any kind as RGB PIL image of size (height, width), by default bicubic.

    Raises:
        TypeError, FileNotFoundError: no image. ValueError: a size or filter that cannot be.
    """
    edges = square.read_size("size", size)
    if edges.keys() != {"height", "width"}:
        raise ValueError(f"size must be (height, width), got {size!r}")
    resample = Image.Resampling.BICUBIC if resample is None else resample
    return load_image(image).resize(
        (edges["width"], edges["height"]), resample, reducing_gap=reducing_gap
    )


def rescale(image: np.ndarray, scale: float = 1 / 255, dtype: Any = np.float32) -> np.ndarray:
    """image * scale, cast to dtype last."""
    return (np.asarray(image) * scale).astype(dtype)


def normalize(image: np.ndarray, mean: Any, std: Any) -> np.ndarray:
    """(image - mean) / std of [..., channels], in the image's dtype, float32 for integers.

    Raises:
        ValueError: neither one number nor one per channel; a zero in std.
    """
    image = np.asarray(image)
    if not np.issubdtype(image.dtype, np.floating):
        image = image.astype(np.float32)
    mean, std = np.asarray(mean, image.dtype), np.asarray(std, image.dtype)
    if not std.all():
        raise ValueError(f"std must hold no zero, got {std}")
    return (image - mean) / std


def _process_images(mean: list[float], std: list[float]) -> Callable[..., torch.Tensor]:
    """`process_images` of a module with these defaults."""

    def process_images(
        images,
        size=(224, 224),
        rescale_factor=1 / 255,
        image_mean=mean,
        image_std=std,
        *,
        resample=None,
    ) -> torch.Tensor:
        """Resize, rescale and normalize images: float32 [images, 3, height, width].

        Raises:
            ValueError: no images; a number that cannot be, such as a filter in third place.
        """
        if not isinstance(rescale_factor, float) or not math.isfinite(rescale_factor):
            raise ValueError(f"rescale_factor must be a finite float, got {rescale_factor!r}")
        images = list(images) if isinstance(images, (list, tuple)) else [images]
        if not images:
            raise ValueError("images is empty: give at least one image")
        arrays = [np.array(resize(image, size, resample)) for image in images]
        arrays = [normalize(rescale(one, rescale_factor), image_mean, image_std) for one in arrays]
        return torch.tensor(np.stack(arrays).transpose(0, 3, 1, 2))  # (N, H, W, 3) -> (N, 3, H, W)

    return process_images


process_images_clip = _process_images(CLIP_MEAN, CLIP_STD)
process_images_half = _process_images(HALVES, HALVES)


def add_image_tokens_to_prompts(
    prefix_prompt: str, bos_token: str | None, image_seq_len: int, image_token: str
) -> str:
    """Image tokens + BOS + prompt + newline; without BOS (None) none, and none is doubled."""
    if not isinstance(prefix_prompt, str):
        raise TypeError(f"prefix_prompt must be a str, got {type(prefix_prompt).__name__}")
    return lay_out(prefix_prompt, image_seq_len, image_token, bos_token)


class OlderBatch(BatchFeature):
    """A BatchFeature whose `pixel_values` are also read as "pixel Value" and "pixel_value"."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(_OLDER_KEYS.get(key, key))

    def __contains__(self, key: object) -> bool:
        return super().__contains__(_OLDER_KEYS.get(key, key))


class paligemmaProcessor(mllama.MllamaImageProcessor):
    """Prompts and images to tensors, of `processing_siglip`: `processor([prompt], [image])`.

    The tokenizer is changed: it gets `<image>`, 1024 `<loc0000>` ... and 128 `<seg000>` ..., adds
    no BOS or EOS itself, and pads. Meta's `Tokenizer` is not; a fast tokenizer is made of it.
    """

    IMAGE_TOKEN = "<image>"
    mean, std = HALVES, HALVES

    def __init__(self, tokenizer: Any, num_image_token: int, image_size: int, **kwargs: Any):
        if isinstance(tokenizer, mllama.Tokenizer):
            tokenizer = fast_tokenizer(tokenizer)
        own = {"image_mean": self.mean, "image_std": self.std, "location_tokens": True}
        super().__init__(tokenizer, num_image_token, image_size, **own | kwargs)
        tokenizer.add_special_tokens(
            {"extra_special_tokens": [self.IMAGE_TOKEN]}, replace_extra_special_tokens=False
        )
        for habit in ("add_bos_token", "add_eos_token"):
            if hasattr(tokenizer, habit):
                setattr(tokenizer, habit, False)

    def __call__(
        self, text=None, images=None, padding="longest", truncation=True, **kwargs: Any
    ) -> OlderBatch:
        """input_ids and attention_mask [prompts, tokens], pixel_values [images, 3, S, S].

        Nothing is cut unless a max_length is given. Else as `mllama.MllamaImageProcessor`.
        """
        if kwargs.get("max_length") is None:  # the tokenizer's own limit knows of no images
            truncation = False
            kwargs.setdefault("verbose", False)
        options = {"padding": padding, "truncation": truncation} | kwargs
        return OlderBatch(super().__call__(text, images, **options))


class MllamaImageProcessor(paligemmaProcessor):
    """Of `processing_mllama`, with CLIP's mean and deviation."""

    mean, std = CLIP_MEAN, CLIP_STD


class PaliGemmaProcessor(paligemmaProcessor):
    """Of `processing_paligemma`, which calls the second argument num_image_tokens."""

    def __init__(self, tokenizer: Any, num_image_tokens: int, image_size: int, **kwargs: Any):
        super().__init__(tokenizer, num_image_tokens, image_size, **kwargs)
