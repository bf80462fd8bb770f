# ruff: noqa: F401
from mllama.dropin.processing import CLIP_MEAN as IMAGENET_STANDARD_MEAN
from mllama.dropin.processing import CLIP_STD as IMAGENET_STANDARD_STD
from mllama.dropin.processing import (
    MllamaImageProcessor,
    add_image_tokens_to_prompts,
    normalize,
    rescale,
    resize,
)
from mllama.dropin.processing import add_image_tokens_to_prompts as add_image_tokens_to_prompt
from mllama.dropin.processing import process_images_clip as process_images
