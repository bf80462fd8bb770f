"""`processing_siglip` of older scripts: pictures normalised to -1..1, as SigLIP takes them."""

import torch
from PIL import Image

from mllama.dropin._pictures import (
    add_image_tokens_to_prompts,
    filter_may_come_third,
    normalize,
    prepare,
    rescale,
    resize,
)
from mllama.dropin._processor import OlderProcessor

__all__ = [
    "IMAGENET_STANDARD_MEAN",
    "IMAGENET_STANDARD_STD",
    "add_image_tokens_to_prompt",
    "add_image_tokens_to_prompts",
    "normalize",
    "paligemmaProcessor",
    "process_images",
    "rescale",
    "resize",
]

IMAGENET_STANDARD_MEAN = [0.5, 0.5, 0.5]
IMAGENET_STANDARD_STD = [0.5, 0.5, 0.5]

add_image_tokens_to_prompt = add_image_tokens_to_prompts


@filter_may_come_third
def process_images(
    images,
    size: tuple[int, int] = (224, 224),
    rescale_factor: float = 1 / 255,
    image_mean: list[float] = IMAGENET_STANDARD_MEAN,
    image_std: list[float] = IMAGENET_STANDARD_STD,
    *,
    resample: int = Image.Resampling.BICUBIC,
) -> torch.Tensor:
    """Resize, rescale and normalise pictures: [pictures, 3, height, width] float32.

    size is (height, width). resample may also come third, before rescale_factor. `prepare` says
    what is accepted and raised.
    """
    return prepare(images, size, rescale_factor, image_mean, image_std, resample)


class paligemmaProcessor(OlderProcessor):
    """`paligemmaProcessor(tokenizer, num_image_token, image_size)`: prompts and pictures to
    tensors, with this module's normalisation.
    """

    pixel_mean, pixel_std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
