"""Llama 3.x: text only."""

from mllama.config.parts import text_spec
from mllama.config.spec import ModelSpec
from mllama.weights.family import Config, Family, Gguf
from mllama.weights.rows import Drop, Rename

DEFAULTS: Config = {
    "model_type": "llama",
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": None,
    "head_dim": None,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "mlp_bias": False,
}

WEIGHT_MAP = (
    # Computed; old files contain it.
    Drop("model.layers.{}.self_attn.rotary_emb.inv_freq"),
    Drop("layers.{}.self_attn.rotary_emb.inv_freq"),
    # `also`: names of transformers' decoder class without a head.
    *(
        Rename(f"language_model.{part}.*", f"model.{part}.*", also=(f"{part}.*",))
        for part in ("embed_tokens", "layers", "norm")
    ),
    Rename("lm_head.weight", "lm_head.weight"),
)
STOCK_PREFIXES = (("language_model", "model"),)


def _read(config: Config) -> ModelSpec:
    return ModelSpec(text=text_spec(config, DEFAULTS, "config"))


FAMILY = Family(
    name="llama",
    defaults=DEFAULTS,
    read=_read,
    weight_map=lambda spec: WEIGHT_MAP,
    stock_class="LlamaForCausalLM",
    stock_prefixes=STOCK_PREFIXES,
    gguf=Gguf("llama", ("silu", "swish"), ("default", "linear", "llama3"), permuted=True),
)
