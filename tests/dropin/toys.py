"""Tiny models of older scripts, and their twins in stock transformers."""

import torch
import transformers

import tiny
from mllama.dropin.config import LLAMA32Config, MLLAMAConfig
from mllama.dropin.generate import load_weights_into_llama
from mllama.dropin.multimodal import MllamaForConditionalGeneration
from mllama.dropin.text import Llama3ForCausalLM, Llama3Model

IMAGE = 128256  # what a config says where no script did
ROPE_FREQ = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context_length": 16,
}
SCALING = {  # the same as transformers writes it
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
UNSCALED = {"rope_type": "default", "rope_theta": 5e5}
CFG = {
    "vocab_size": 99,
    "context_length": 64,
    "emb_dim": 64,
    "n_heads": 4,
    "n_layers": 2,
    "hidden_dim": 96,
    "n_kv_groups": 2,
    "rope_base": 500000.0,
    "dtype": torch.float32,
    "rope_freq": ROPE_FREQ,
}
TEXT = {name: CFG[name] for name in ("vocab_size", "n_heads", "n_layers", "hidden_dim", "dtype")}
TEXT |= {"hidden_size": 64, "n_kv_groups": 2}


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def stock(**changes) -> transformers.LlamaForCausalLM:
    """Stock transformers' Llama of CFG's sizes, random everywhere."""
    sizes = tiny.SIZES | {
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_parameters": SCALING,
    }
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes))
    return tiny.randomize(model).eval()


def by_dict(**changes) -> Llama3Model:
    """A model of a dict with the stock twin's weights."""
    model = Llama3Model(CFG | changes)
    load_weights_into_llama(model, CFG, stock().state_dict())
    return model.eval()


def config(**changes) -> LLAMA32Config:
    sizes = {name: value for name, value in CFG.items() if name != "emb_dim"}
    return LLAMA32Config(**sizes | {"hidden_size": 64} | changes)


def by_config(**changes) -> Llama3ForCausalLM:
    """A model of a config with the stock twin's weights."""
    model, source = Llama3ForCausalLM(config(**changes)), by_dict().state_dict()
    model.lm_head.weight.data.copy_(source.pop("out_head.weight"))
    model.model.load_state_dict(source)
    return model.eval()


def ids(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 99, (rows, length), generator=torch.Generator().manual_seed(3))


def hidden(length: int) -> torch.Tensor:
    """What a script hands to a block: True above the diagonal."""
    return torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)


def whole_config(text: dict | None = None, **options) -> MLLAMAConfig:
    """A tiny SigLIP + Llama of dicts."""
    return MLLAMAConfig(tiny.VISION, TEXT | (text or {}), **options)


def whole(seed: int = 0, **options) -> MllamaForConditionalGeneration:
    """Its model in eval mode, random everywhere."""
    model = MllamaForConditionalGeneration(whole_config(**options))
    return tiny.randomize(model, seed).eval()


def prompt(*words: int, image: int = IMAGE) -> torch.Tensor:
    """What a processor makes of an image and a text: [1, 4 + words]."""
    return torch.tensor([[image] * tiny.PATCHES + list(words)])
