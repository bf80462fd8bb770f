"""Tiny text models of both families of older scripts, and their twins in stock transformers and in
the package.
"""

import torch
import transformers

import twins
from mllama.dropin.model import (
    Llama3ForCausalLM,
    Llama3Model,
    LLAMA32Config,
    load_weights_into_llama,
)
from mllama.hf.configs import MllamaTextConfig
from mllama.text.decoder import Decoder

ROPE_FREQ = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context_length": 16,
}
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


def stock(**changes) -> transformers.LlamaForCausalLM:
    """Stock transformers' Llama of CFG's sizes, random everywhere."""
    scaling = ROPE_FREQ | {
        "rope_type": "llama3",
        "original_max_position_embeddings": ROPE_FREQ["original_context_length"],
    }
    del scaling["original_context_length"]
    sizes = twins.SIZES | {
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": scaling,
    }
    return twins.randomise(
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes))
    ).eval()


def by_dict(**changes) -> Llama3Model:
    """A model of a dict with the stock twin's weights."""
    model = Llama3Model(CFG | changes)
    load_weights_into_llama(model, CFG, stock().state_dict())
    return model.eval()


def config(**changes) -> LLAMA32Config:
    return LLAMA32Config(
        **{name: value for name, value in CFG.items() if name != "emb_dim"}
        | {"hidden_size": 64}
        | changes
    )


def by_config(**changes) -> Llama3ForCausalLM:
    """A model of a config object with the stock twin's weights."""
    model, source = Llama3ForCausalLM(config(**changes)), by_dict().state_dict()
    model.lm_head.weight.data.copy_(source.pop("out_head.weight"))
    model.model.load_state_dict(source)
    return model.eval()


def decoder() -> Decoder:
    """The package's own decoder with the stock twin's weights."""
    own = Decoder(MllamaTextConfig(**CFG, rms_norm_eps=1e-5))
    own.load_state_dict(
        {
            name.removeprefix("model."): value
            for name, value in stock().state_dict().items()
            if name != "lm_head.weight"
        }
    )
    return own.eval()


def ids(rows: int = 2, length: int = 40) -> torch.Tensor:
    return torch.randint(0, 99, (rows, length), generator=torch.Generator().manual_seed(3))


def hidden(length: int) -> torch.Tensor:
    """What a script hands to a block: True above the diagonal."""
    return torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
