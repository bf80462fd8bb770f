"""Gemma 1: text only, with Llama's tensor names."""

from dataclasses import replace

from mllama.config.parts import text_spec
from mllama.config.spec import ModelSpec, TextSpec
from mllama.families.llama import STOCK_PREFIXES, WEIGHT_MAP
from mllama.weights.family import Config, Family, Gguf

DEFAULTS: Config = {
    "model_type": "gemma",
    "vocab_size": 256000,
    "hidden_size": 3072,
    "intermediate_size": 24576,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "head_dim": 256,
    "hidden_act": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "use_bidirectional_attention": None,
}


def gemma_text(config: Config, owner: str = "text_config") -> TextSpec:
    """A Gemma decoder's spec. Raises ValueError for invalid values."""
    if config["hidden_act"] == "gelu":  # in old files it means the tanh form, as in transformers
        config = config | {"hidden_act": "gelu_pytorch_tanh"}
    text = text_spec(config, DEFAULTS, owner, norm_offset=1.0)
    return replace(text, embedding_scale=float(text.hidden_size) ** 0.5)


def refuse_bidirectional(config: Config) -> None:
    """Raise ValueError for a Gemma encoder."""
    if config["use_bidirectional_attention"]:
        raise ValueError(
            "use_bidirectional_attention: a Gemma that attends in both directions cannot generate "
            "text and is not supported"
        )


def _read(config: Config) -> ModelSpec:
    refuse_bidirectional(config)
    return ModelSpec(text=gemma_text(config, "config"))


FAMILY = Family(
    name="gemma",
    defaults=DEFAULTS,
    read=_read,
    weight_map=lambda spec: WEIGHT_MAP,
    stock_class="GemmaForCausalLM",
    stock_prefixes=STOCK_PREFIXES,
    gguf=Gguf("gemma", ("gelu_pytorch_tanh",), norm_shift=1.0, tied=True),
)
