"""mllama: run and fine-tune Llama-3.2-style vision-language models, on C++ operators registered with torch.

Importing the package costs nothing beyond this file: every public name is loaded on first use (PEP 562).
"""

import importlib

__version__ = "0.1.0"

_HOME = {
    "Linear_LORA": "lora",
    "MllamaConfig": "config",
    "MllamaForConditionalGeneration": "modeling",
    "MllamaImageProcessor": "processing.processor",
    "PaliGemmaProcessor": "processing.paligemma",
    "SiglipModel": "siglip",
    "TiledProcessor": "processing.tiled",
    "Tokenizer": "processing.tokenizer",
    "ask": "api",
    "chat_labels": "processing.chat",
    "convert_linears_to_lora": "lora",
    "convert_to_lora": "lora",
    "fuse": "seeing",
    "load": "api",
    "load_hf_model": "hf",
    "load_lora": "lora",
    "load_processor": "processing.auto",
    "lora_disabled": "lora",
    "lora_parameters": "lora",
    "merge_and_unload": "lora",
    "merge_lora": "lora",
    "parse_detections": "processing.paligemma",
    "replace_linear_with_lora": "lora",
    "save_lora": "lora",
    "unmerge_lora": "lora",
}

__all__ = ["__version__", "ops", *sorted(_HOME)]


def __getattr__(name: str):
    if name == "ops":
        return importlib.import_module("mllama.ops")
    if name in _HOME:
        return getattr(importlib.import_module(f"mllama.{_HOME[name]}"), name)
    raise AttributeError(f"module 'mllama' has no attribute {name!r}; its public names are {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted(__all__)
