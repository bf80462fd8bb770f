"""Model folders of every family as people have them: a tiny random model of stock transformers,
written with its processor's files. And what tests of folders share.
"""

import json
from pathlib import Path

import torch
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.processing_llava import LlavaProcessor
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from mllama import MllamaImageProcessor
from mllama.hf.processors.paligemma import PaliGemmaProcessor
from mllama.hf.processors.square import SquareImageProcessor
from mllama.hf.processors.tiled import TiledImageProcessor, TiledProcessor
from tiny import models, stock, tokenizers
from tiny.batches import batch, images, tokens
from tiny.sizes import IMAGE, PATCHES, VISION

SIDE = VISION["image_size"]
SIZE = {"size": {"height": SIDE, "width": SIDE}}
TEXT_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}"
    "{% endfor %}"
)
IMAGE_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] + ': ' }}{% for part in message['content'] %}"
    "{{ 'IMAGE' if part['type'] == 'image' else part['text'] }}{% endfor %}{{ '\n' }}{% endfor %}"
)
INPUTS = batch([IMAGE] * PATCHES + tokens(6), tokens(3) + [IMAGE] * PATCHES + tokens(2)) | {
    "pixel_values": images(2)
}


def logits(model) -> torch.Tensor:
    """Of `INPUTS`, which fit `tiny.model()`, without the padding's."""
    with torch.no_grad():
        return model(**INPUTS).logits[INPUTS["attention_mask"].bool()]


def change(folder: Path, edit, name: str = "config.json") -> None:
    """Edit a JSON file of a folder in place."""
    content = json.loads((folder / name).read_text())
    edit(content)
    (folder / name).write_text(json.dumps(content))


def _text(tokenizer, **options) -> dict:
    return {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 512,
        "rope_theta": 500000.0,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    } | options


def _llama():
    tokenizer = tokenizers.make()
    tokenizer.chat_template = TEXT_TEMPLATE
    return stock.make("llama", **_text(tokenizer), tie_word_embeddings=True), tokenizer


def _gemma():
    tokenizer = tokenizers.make(adds_bos=True)
    return stock.make("gemma", **_text(tokenizer)), tokenizer


def _ours():
    processor = MllamaImageProcessor(tokenizers.make(bos=False), PATCHES, SIDE)
    text = _text(processor.tokenizer)
    del text["bos_token_id"]
    return models.model(text=text, image_token_index=processor.image_token_id), processor


def _clip():
    tokenizer = tokenizers.make(adds_bos=True)
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=SIZE["size"]),
        tokenizer,
        8,
        "default",
        chat_template=IMAGE_TEMPLATE.replace("IMAGE", "<image>"),
        num_additional_image_tokens=1,
    )
    index = tokenizer.convert_tokens_to_ids("<image>")
    return stock.make("llava, clip, -2", text=_text(tokenizer), image_token_index=index), processor


def _paligemma():
    processor = PaliGemmaProcessor(
        SquareImageProcessor(**SIZE, image_seq_length=PATCHES), tokenizers.make()
    )
    index = processor.tokenizer.convert_tokens_to_ids("<image>")
    text = _text(processor.tokenizer)
    return stock.make("paligemma", text=text, image_token_index=index), processor


def _mllama():
    tokenizer = tokenizers.make(adds_bos=True)
    tokenizer.add_tokens(["<|image|>"], special_tokens=True)
    processor = TiledProcessor(
        TiledImageProcessor(**SIZE),
        tokenizer,
        chat_template=IMAGE_TEMPLATE.replace("IMAGE", "<|image|>"),
    )
    index = len(tokenizer) - 1  # the first row behind the vocabulary
    text = _text(tokenizer, vocab_size=index)
    return stock.make("mllama", text=text, image_token_index=index), processor


def _siglip():
    return stock.make("siglip_vision_model"), SiglipImageProcessorPil(**SIZE)


MAKERS = {
    "llama": _llama,
    "gemma": _gemma,
    "llava, siglip": _ours,
    "llava, clip": _clip,
    "paligemma": _paligemma,
    "mllama": _mllama,
    "siglip": _siglip,
}


def write(family: str, folder: Path) -> Path:
    """Write a family's folder."""
    model, processor = MAKERS[family]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder
