import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoProcessor

from mllama.processing.processor import MllamaImageProcessor


def picture(seed=0, size=(50, 37)):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


@pytest.mark.parametrize(("bos", "adds_bos"), [(True, False), (True, True), (False, False)])
def test_stock_autoprocessor_gives_the_same_ids_and_pixels(make_tokenizer, tmp_path, bos, adds_bos):
    processor = MllamaImageProcessor(make_tokenizer(bos, adds_bos), 16, 32)
    messages = [{"role": "user", "content": [{"type": "image", "image": picture()}, {"type": "text", "text": "How many circles?"}]}]
    batch = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
    plain = processor(["How many circles?"], [picture()], padding=True)
    processor.save_pretrained(tmp_path)
    stock = AutoProcessor.from_pretrained(tmp_path).apply_chat_template(messages, tokenize=True, return_dict=True, return_tensors="pt")
    for name in ("input_ids", "attention_mask", "pixel_values"):
        assert torch.equal(batch[name], stock[name]) and torch.equal(batch[name], plain[name])
