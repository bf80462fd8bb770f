"""mllama: run and fine-tune Llama-3.2-style vision-language models with C++ operators for PyTorch.

Importing the package loads this file alone; every public name is imported on first use (PEP 562).
"""

import importlib

# Type checkers take this name for true. Importing typing would take longer than this file.
TYPE_CHECKING = False

__version__ = "0.1.0"

if TYPE_CHECKING:  # the names of `_HOME` for type checkers; tests/test_types.py compares the two
    from mllama import ops as ops
    from mllama.api import ask as ask
    from mllama.api import load as load
    from mllama.hf.configs import MllamaConfig as MllamaConfig
    from mllama.hf.fusing import fuse as fuse
    from mllama.hf.loader import load_hf_model as load_hf_model
    from mllama.hf.modeling import MllamaForConditionalGeneration as MllamaForConditionalGeneration
    from mllama.hf.processors.auto import load_processor as load_processor
    from mllama.hf.processors.chat import chat_labels as chat_labels
    from mllama.hf.processors.llava import MllamaImageProcessor as MllamaImageProcessor
    from mllama.hf.processors.paligemma import PaliGemmaProcessor as PaliGemmaProcessor
    from mllama.hf.processors.tiled import TiledProcessor as TiledProcessor
    from mllama.hf.quantizing import quantize as quantize
    from mllama.hf.siglip import SiglipModel as SiglipModel
    from mllama.lora import Linear_LORA as Linear_LORA
    from mllama.lora import activate_lora as activate_lora
    from mllama.lora import combine_lora as combine_lora
    from mllama.lora import convert_linears_to_lora as convert_linears_to_lora
    from mllama.lora import convert_to_lora as convert_to_lora
    from mllama.lora import delete_lora as delete_lora
    from mllama.lora import load_lora as load_lora
    from mllama.lora import lora_active as lora_active
    from mllama.lora import lora_disabled as lora_disabled
    from mllama.lora import lora_names as lora_names
    from mllama.lora import lora_parameters as lora_parameters
    from mllama.lora import merge_and_unload as merge_and_unload
    from mllama.lora import merge_lora as merge_lora
    from mllama.lora import replace_linear_with_lora as replace_linear_with_lora
    from mllama.lora import save_lora as save_lora
    from mllama.lora import unmerge_lora as unmerge_lora
    from mllama.lora.adapt import adapt as adapt
    from mllama.processing.detections import parse_detections as parse_detections
    from mllama.processing.tokenizer import Tokenizer as Tokenizer
    from mllama.quant.packer import optimize as optimize
    from mllama.train.checks import check_frozen as check_frozen
    from mllama.train.checks import check_gradients as check_gradients
    from mllama.train.checks import check_labels as check_labels
    from mllama.train.checks import check_overfit as check_overfit

_HOME = {
    "Linear_LORA": "lora",
    "MllamaConfig": "hf.configs",
    "MllamaForConditionalGeneration": "hf.modeling",
    "MllamaImageProcessor": "hf.processors.llava",
    "PaliGemmaProcessor": "hf.processors.paligemma",
    "SiglipModel": "hf.siglip",
    "TiledProcessor": "hf.processors.tiled",
    "Tokenizer": "processing.tokenizer",
    "activate_lora": "lora",
    "adapt": "lora.adapt",
    "ask": "api",
    "chat_labels": "hf.processors.chat",
    "combine_lora": "lora",
    "check_frozen": "train.checks",
    "check_gradients": "train.checks",
    "check_labels": "train.checks",
    "check_overfit": "train.checks",
    "convert_linears_to_lora": "lora",
    "convert_to_lora": "lora",
    "delete_lora": "lora",
    "fuse": "hf.fusing",
    "load": "api",
    "load_hf_model": "hf.loader",
    "load_lora": "lora",
    "load_processor": "hf.processors.auto",
    "lora_active": "lora",
    "lora_disabled": "lora",
    "lora_names": "lora",
    "lora_parameters": "lora",
    "merge_and_unload": "lora",
    "merge_lora": "lora",
    "optimize": "quant.packer",
    "parse_detections": "processing.detections",
    "quantize": "hf.quantizing",
    "replace_linear_with_lora": "lora",
    "save_lora": "lora",
    "unmerge_lora": "lora",
}

# Hidden from type checkers: they cannot read a computed __all__, and __getattr__ would let any
# name pass.
if not TYPE_CHECKING:
    __all__ = ["__version__", "ops", *sorted(_HOME)]

    def __getattr__(name: str):
        if name == "ops":
            return importlib.import_module("mllama.ops")
        if name in _HOME:
            return getattr(importlib.import_module(f"mllama.{_HOME[name]}"), name)
        raise AttributeError(
            f"module 'mllama' has no attribute {name!r}; its public names are {', '.join(__all__)}"
        )

    def __dir__() -> list[str]:
        return sorted(__all__)
