"""Fixtures that the processors' tests share: a tokenizer with Llama 3's special tokens, and
images of noise.
"""

import numpy as np
import pytest
from PIL import Image

from tiny import tokenizers


@pytest.fixture(scope="session")
def make_llama_tokenizer():
    """make_llama_tokenizer(adds_bos, without): `tiny.tokenizers.make_llama3`."""
    return tokenizers.make_llama3


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
    """noise(width, height, seed): an image."""

    def make(width: int = 50, height: int = 37, seed: int = 0) -> Image.Image:
        return Image.fromarray(
            np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
        )

    return make
