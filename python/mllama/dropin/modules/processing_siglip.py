# ruff: noqa: F401
from mllama.dropin.processing import HALVES as IMAGENET_STANDARD_MEAN
from mllama.dropin.processing import HALVES as IMAGENET_STANDARD_STD
from mllama.dropin.processing import (
    add_image_tokens_to_prompts,
    normalize,
    paligemmaProcessor,
    rescale,
    resize,
)
from mllama.dropin.processing import add_image_tokens_to_prompts as add_image_tokens_to_prompt
from mllama.dropin.processing import process_images_half as process_images
