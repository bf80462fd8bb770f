"""Gemma 3: text only, with Llama's tensor names. Gemma 2's layers with normalized heads, and other
rotary frequencies in layers with a window.
"""

from mllama.config.checks import check_size
from mllama.config.files import to_older
from mllama.config.parts import check_values
from mllama.config.spec import ModelSpec
from mllama.families import gemma2
from mllama.families.gemma import refuse_bidirectional
from mllama.families.llama import STOCK_PREFIXES, WEIGHT_MAP
from mllama.weights.family import Config, Family, Gguf

DEFAULTS: Config = gemma2.DEFAULTS | {
    "model_type": "gemma3_text",
    "vocab_size": 262208,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        gemma2.FULL: {"rope_theta": 1000000.0, "rope_type": "default"},
        gemma2.SLIDING: {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "sliding_window_pattern": 6,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
    "use_bidirectional_attention": False,
}


def _read(config: Config) -> ModelSpec:
    refuse_bidirectional(config)
    # The field exists, but transformers' attention does not read it.
    check_values(config, {"attn_logit_softcapping": None}, "config")
    check_size("config", "sliding_window_pattern", every := config["sliding_window_pattern"])
    text = gemma2.windowed_text(
        config, DEFAULTS, "config", config["rope_parameters"], every, qk_norm=True
    )
    return ModelSpec(text=text)


def _write(config: Config) -> Config:
    """The two ropes in the older spelling, if it can express them."""
    ropes = config.get("rope_parameters")
    if not ropes or ropes[gemma2.SLIDING]["rope_type"] != "default":
        return to_older(config)
    full = {"rope_parameters": ropes[gemma2.FULL]}
    return to_older(config | full) | {"rope_local_base_freq": ropes[gemma2.SLIDING]["rope_theta"]}


FAMILY = Family(
    name="gemma3_text",
    defaults=DEFAULTS,
    read=_read,
    weight_map=lambda spec: WEIGHT_MAP,
    write=_write,
    stock_class="Gemma3ForCausalLM",
    stock_prefixes=STOCK_PREFIXES,
    gguf=Gguf("gemma3", ("gelu_pytorch_tanh",), norm_shift=1.0, tied=True),
)
