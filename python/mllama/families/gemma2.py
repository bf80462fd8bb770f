"""Gemma 2: text only, with Llama's tensor names; four norms per layer, alternating windows."""

from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from mllama.config.checks import (
    TEXT_ACTIVATIONS,
    check_choice,
    check_kind,
    check_number,
    check_size,
)
from mllama.config.parts import text_fields
from mllama.config.spec import LayerSpec, ModelSpec, RopeSpec, TextSpec
from mllama.families.gemma import refuse_bidirectional
from mllama.families.llama import STOCK_PREFIXES, WEIGHT_MAP
from mllama.weights.family import Config, Family, Gguf

DEFAULTS: Config = {
    "model_type": "gemma2",
    "vocab_size": 256000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 26,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "pad_token_id": 0,
    "bos_token_id": 2,
    "eos_token_id": 1,
    "tie_word_embeddings": True,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
    "attention_bias": False,
    "attention_dropout": 0.0,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
    "layer_types": None,
    "final_logit_softcapping": 30.0,
    "attn_logit_softcapping": 50.0,
    "use_bidirectional_attention": None,
}
FULL, SLIDING = "full_attention", "sliding_attention"


def gemma2_text(config: Config, owner: str = "text_config") -> TextSpec:
    """A Gemma 2 decoder's spec. Raises ValueError for invalid values."""
    softcap = check_softcap(config, "attn_logit_softcapping", owner)
    ropes = dict.fromkeys((FULL, SLIDING), config["rope_parameters"])
    return windowed_text(config, DEFAULTS, owner, ropes, every=2, softcap=softcap)


def windowed_text(
    config: Config,
    read: Collection[str],
    owner: str,
    ropes: Mapping[str, Mapping[str, Any]],
    every: int,
    **layer: Any,
) -> TextSpec:
    """The decoder of Gemma 2 and 3: four norms per layer, and most layers with a window.

    Args:
        config, read, owner: as `text_spec`.
        ropes: {kind of layer: its `rope_parameters`}.
        every: without `layer_types`, the last of this many layers has full attention.
        layer: further fields of every layer.

    Raises:
        ValueError: invalid values; the message names the field.
    """
    check_choice(owner, "hidden_activation", config["hidden_activation"], TEXT_ACTIVATIONS)
    hidden_act = {"hidden_act": config["hidden_activation"]}
    fields = text_fields(config | hidden_act, {*read, "hidden_act"}, owner)
    count, kinds = config["num_hidden_layers"], config["layer_types"]
    if kinds is None:
        kinds = [SLIDING if number % every else FULL for number in range(1, count + 1)]
    check_kind(owner, "layer_types", kinds, list)
    for kind in kinds:
        check_choice(owner, "layer_types", kind, (SLIDING, FULL))
    if len(kinds) < count:
        raise ValueError(f"{owner}: layer_types must be {count}, one per layer, got {len(kinds)}")
    if SLIDING in kinds:
        check_size(owner, "sliding_window", config["sliding_window"])
    check_number(owner, "query_pre_attn_scalar", config["query_pre_attn_scalar"])
    scale = config["query_pre_attn_scalar"] ** -0.5
    full = LayerSpec(rope=RopeSpec.of(ropes[FULL]), scale=scale, post_norms=True, **layer)
    window = config["sliding_window"]
    of_kind = {FULL: full, SLIDING: replace(full, window=window, rope=RopeSpec.of(ropes[SLIDING]))}
    return TextSpec(
        **fields,
        layers=tuple(of_kind[kind] for kind in kinds[:count]),
        norm_offset=1.0,
        embedding_scale=float(config["hidden_size"]) ** 0.5,
        final_logit_softcapping=check_softcap(config, "final_logit_softcapping", owner),
    )


def check_softcap(config: Config, name: str, owner: str) -> float | None:
    """A soft cap or None. Raises ValueError for anything else."""
    if config[name] is None:
        return None
    check_number(owner, name, config[name])
    return float(config[name])


def _read(config: Config) -> ModelSpec:
    refuse_bidirectional(config)
    return ModelSpec(text=gemma2_text(config, "config"))


FAMILY = Family(
    name="gemma2",
    defaults=DEFAULTS,
    read=_read,
    weight_map=lambda spec: WEIGHT_MAP,
    stock_class="Gemma2ForCausalLM",
    stock_prefixes=STOCK_PREFIXES,
    gguf=Gguf("gemma2", ("gelu_pytorch_tanh",), norm_shift=1.0, tied=True),
)
