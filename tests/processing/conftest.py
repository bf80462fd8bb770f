"""Fixtures that the processors' tests share: a tokenizer with Llama 3's special tokens, and
pictures of noise.
"""

import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

SPECIAL = [
    "begin_of_text",
    "end_of_text",
    "finetune_right_pad_id",
    "start_header_id",
    "end_header_id",
    "eot_id",
    "python_tag",
    "image",
]


@pytest.fixture(scope="session")
def make_llama_tokenizer():
    """make_llama_tokenizer(adds_bos, without): bytes and Llama 3's special tokens, in a
    transformers tokenizer.
    """

    def make(adds_bos: bool = False, without: str = "", **options) -> PreTrainedTokenizerFast:
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        backend = Tokenizer(
            models.BPE({character: index for index, character in enumerate(alphabet)}, [])
        )
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
        backend.add_special_tokens([f"<|{name}|>" for name in SPECIAL if name != without])
        if adds_bos:
            tokens = [("<|begin_of_text|>", backend.token_to_id("<|begin_of_text|>"))]
            backend.post_processor = processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=tokens
            )
        named = {
            "bos_token": "<|begin_of_text|>",
            "eos_token": "<|eot_id|>",
            "pad_token": "<|finetune_right_pad_id|>",
        }
        return PreTrainedTokenizerFast(tokenizer_object=backend, **{**named, **options})

    return make


@pytest.fixture(scope="session")
def llama_template():
    """The chat template that transformers' converter writes for Llama-3.2-Vision."""
    return (
        "{% for message in messages %}{% if loop.index0 == 0 %}{{ bos_token }}{% endif %}"
        "{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for content in "
        "message['content'] %}"
        "{% if content['type'] == 'image' %}{{ '<|image|>' }}{% elif content['type'] == 'text' "
        "%}{{ content['text'] }}{% endif %}"
        "{% endfor %}{% endif %}{{ '<|eot_id|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% "
        "endif %}"
    )


@pytest.fixture(scope="session")
def noise():
    """noise(width, height, seed): a picture."""

    def make(width: int = 50, height: int = 37, seed: int = 0) -> Image.Image:
        return Image.fromarray(
            np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        )

    return make
