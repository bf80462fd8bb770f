"""Tiny configs as older scripts write them, and the names that their weight files have."""

import torch

import twins
from mllama.dropin._config import MLLAMAConfig
from mllama.dropin._multimodal import MllamaForConditionalGeneration

IMAGE = 128256  # what the config says where nobody said it
VISION = twins.VISION
TEXT = {
    "vocab_size": twins.VOCABULARY,
    "hidden_size": 64,
    "n_heads": 4,
    "n_layers": 2,
    "hidden_dim": 96,
    "n_kv_groups": 2,
    "dtype": torch.float32,
}


def config(text: dict | None = None, vision: dict | None = None, **options) -> MLLAMAConfig:
    """A tiny config from dicts, changed by what is given."""
    return MLLAMAConfig(VISION | (vision or {}), TEXT | (text or {}), **options)


def model(seed: int = 0, **options) -> MllamaForConditionalGeneration:
    """A tiny model in eval mode, random everywhere."""
    return twins.randomise(MllamaForConditionalGeneration(config(**options)), seed).eval()


def prompt(*ids: int, image: int = IMAGE) -> torch.Tensor:
    """What a processor makes of a picture and a text: [1, 4 + ids]."""
    return torch.tensor([[image] * twins.PATCHES + list(ids)])
