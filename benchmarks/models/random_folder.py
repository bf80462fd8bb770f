"""Folders of a Llama-3.2-Vision with random weights, larger than memory, and of its processor."""

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast

from benchmarks.peers.on_device import TILE_TABLES, without_empty_tiles
from mllama import MllamaForConditionalGeneration
from mllama.hf.processors.tiled import TiledImageProcessor, TiledProcessor

SPECIAL = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
# An image may stand in the text or be a part of its own, since engines differ in that.
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}"
    "{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{{ part['text'] if part['type'] == 'text' else '<|image|>' }}{% endfor %}{% endif %}"
    "{{ eos_token }}{% endfor %}"
)


def write_random(config: Any, folder: Path) -> None:
    """Write a model in bfloat16, with one file's tensors in memory at a time.

    Args:
        config: a config object of transformers.
        folder: gets config.json and the weights.
    """
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    model.to(torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        owner, _, last = name.rpartition(".")
        value = _random(name, parameter.shape)
        if name.endswith(TILE_TABLES):
            value = without_empty_tiles(value, config.vision_config)
        setattr(model.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
    model.save_pretrained(folder, max_shard_size="2GB")


def _random(name: str, shape: torch.Size) -> torch.Tensor:
    """Values of a parameter. Rows of a matrix are windows of one line of random numbers, each a
    number further, so that only the line takes memory.
    """
    row = torch.empty(shape[1:], device="meta")
    numbers = torch.randn(shape[0] + row.numel() - 1).mul_(0.02)
    if len(shape) == 1 and "norm" in name and name.endswith("weight"):
        numbers += 1
    return numbers.bfloat16().as_strided(shape, (1, *row.stride()))


def write_processor(config: Any, folder: Path) -> None:
    """Write a processor: tokens are bytes, and names for the rest of the vocabulary.

    Args:
        config: as `write_random` takes it. The image token comes after the vocabulary.
        folder: gets the files, preprocessor_config.json and processor_config.json among them.
    """
    words = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *SPECIAL.values()]
    words += [f"w{index}" for index in range(len(words), config.text_config.vocab_size)]
    backend = Tokenizer(models.BPE({word: index for index, word in enumerate(words)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([*SPECIAL.values(), "<|image|>"])
    side = config.vision_config.image_size
    processor = TiledProcessor(
        TiledImageProcessor(size={"height": side, "width": side}),
        PreTrainedTokenizerFast(tokenizer_object=backend, **SPECIAL),
        chat_template=TEMPLATE,
    )
    processor.save_pretrained(folder)
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
