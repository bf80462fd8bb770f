"""The two loaders of older scripts, `utils.load_hf_model` and `Model.utils.load_hf_model`, by one
function.
"""

import os

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mllama.api import model_class
from mllama.dropin._multimodal import MllamaForConditionalGeneration
from mllama.dropin.modeling_gemma import GemmaForCausalLM, PaliGemmaForConditionalGeneration
from mllama.hf.loader import load_as
from mllama.hf.modeling import MllamaForConditionalGeneration as PackageModel
from mllama.processing.tokenizer import Tokenizer

_GEMMAS = {"gemma": GemmaForCausalLM, "paligemma": PaliGemmaForConditionalGeneration}


def load_older(
    model_path: str | os.PathLike, device: str | torch.device, strict: bool
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | Tokenizer]:
    """`mllama.load_hf_model` of the class that takes `kv_cache`, with a tokenizer that pads on the
    right.
    """
    model, tokenizer = load_as(_class, model_path, device, strict)
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        tokenizer.padding_side = "right"
    return model, tokenizer


def _class(config: PretrainedConfig) -> type[PreTrainedModel]:
    found = model_class(config)
    return (
        _GEMMAS.get(config.model_type, MllamaForConditionalGeneration)
        if found is PackageModel
        else found
    )
