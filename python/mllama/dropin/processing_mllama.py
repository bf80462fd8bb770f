"""`processing_mllama` of older scripts: pictures normalised with CLIP's mean and deviation, which
the module calls ImageNet's.
"""

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
    "MllamaImageProcessor",
    "add_image_tokens_to_prompt",
    "add_image_tokens_to_prompts",
    "normalize",
    "process_images",
    "rescale",
    "resize",
]

IMAGENET_STANDARD_MEAN = [0.48145466, 0.4578275, 0.40821073]
IMAGENET_STANDARD_STD = [0.26862954, 0.26130258, 0.27577711]

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


class MllamaImageProcessor(OlderProcessor):
    """`MllamaImageProcessor(tokenizer, num_image_token, image_size)`: prompts and pictures to
    tensors, with this module's normalisation.
    """

    pixel_mean, pixel_std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD
