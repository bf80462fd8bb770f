"""`processing_paligemma` of older scripts: the functions of `processing_siglip`, and its processor
under PaliGemma's name.
"""

from mllama.dropin._processor import OlderProcessor
from mllama.dropin.processing_siglip import (
    IMAGENET_STANDARD_MEAN,
    IMAGENET_STANDARD_STD,
    add_image_tokens_to_prompt,
    add_image_tokens_to_prompts,
    normalize,
    process_images,
    rescale,
    resize,
)

__all__ = [
    "IMAGENET_STANDARD_MEAN",
    "IMAGENET_STANDARD_STD",
    "PaliGemmaProcessor",
    "add_image_tokens_to_prompt",
    "add_image_tokens_to_prompts",
    "normalize",
    "process_images",
    "rescale",
    "resize",
]


class PaliGemmaProcessor(OlderProcessor):
    """`PaliGemmaProcessor(tokenizer, num_image_tokens, image_size)`: prompts and pictures to
    tensors, pixels in -1..1.
    """

    pixel_mean, pixel_std = IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD

    def __init__(self, tokenizer, num_image_tokens: int, image_size: int, **kwargs):
        super().__init__(tokenizer, num_image_tokens, image_size, **kwargs)
