"""The text configs of older scripts: an object, `LLAMA32Config`, and a plain dict,
`LLAMA32_CONFIG`.
"""

import inspect
from collections.abc import Mapping
from typing import Any

import torch

from mllama.hf.configs import TEXT_SHORT_NAMES, MllamaTextConfig
from mllama.ops._dispatch import FLOAT_DTYPES

_ROPE_FREQ = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context_length": 8192,
}
# What a Llama has of the package's choices; the classes here have no others.
_LLAMA = {
    "attention_bias": False,
    "mlp_bias": False,
    "hidden_act": "silu",
    "norm_offset": 0,
    "embedding_scale": None,
    "cross_attention_layers": None,
}

# Of Llama 3.2 1B.
LLAMA32_CONFIG = {
    "vocab_size": 128_256,
    "context_length": 131_072,  # tokens
    "emb_dim": 2048,
    "n_heads": 32,
    "n_layers": 16,
    "hidden_dim": 8192,
    "n_kv_groups": 8,
    "rope_base": 500_000.0,
    "dtype": torch.bfloat16,
    "rope_freq": dict(_ROPE_FREQ),
}

# Other names of what LLAMA32Config has a default for: the default gives way to them.
_OTHER_NAMES = {
    "hidden_size": ("emb_dim",),
    "n_heads": ("num_attention_heads",),
    "n_layers": ("num_hidden_layers",),
    "hidden_dim": ("intermediate_size",),
    "n_kv_groups": ("num_key_value_heads",),
    "rope_base": ("rope_theta", "rope_parameters"),
    "rope_freq": ("rope_scaling", "rope_parameters"),
    "dtype": ("torch_dtype",),
    "pad_token_index": ("pad_token_id",),
}


class LLAMA32Config(MllamaTextConfig):
    """The package's config of a decoder with the older names, order and defaults. Hugging Face's
    names are taken and read too.

    Args:
        vocab_size, hidden_size, n_heads, n_layers, hidden_dim, n_kv_groups, rms_norm_eps: sizes and
        numbers of the decoder.
        context_length: the most tokens that the model takes.
        max_position_embeddings: kept, to be read.
        rope_base: base of the rotary frequencies.
        dtype: what weights are made in.
        rope_freq: Llama 3's frequency scaling; None is that of Llama 3.2.
        pad_token_index: padding id, or None.

    Raises:
        ValueError: a size that is not a positive integer, or sizes that do not go together; the
            text names the field.
    """

    attribute_map = {
        short: name for short, name in TEXT_SHORT_NAMES.items() if short != "context_length"
    } | {"pad_token_index": "pad_token_id"}
    has_no_defaults_at_init = (
        True  # or transformers would make one without arguments, to print what differs
    )

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int = 4096,
        context_length: int = 131072,
        n_heads: int = 32,
        n_layers: int = 16,
        hidden_dim: int = 8192,
        max_position_embeddings: int = 2048,
        n_kv_groups: int = 8,
        rope_base: float = 500000.0,
        rms_norm_eps: float = 1e-05,
        dtype: torch.dtype | str = torch.float16,
        rope_freq: dict[str, float] | None = None,
        pad_token_index: int | None = None,
        **kwargs: Any,
    ):
        given = {
            "hidden_size": hidden_size,
            "n_heads": n_heads,
            "n_layers": n_layers,
            "hidden_dim": hidden_dim,
            "n_kv_groups": n_kv_groups,
            "rope_base": rope_base,
            "dtype": dtype,
            "rope_freq": rope_freq,
            "pad_token_index": pad_token_index,
        }
        kwargs = {name: value for name, value in kwargs.items() if value is not None}
        for name, others in _OTHER_NAMES.items():
            if given[name] == _DEFAULTS[name] and not kwargs.keys().isdisjoint(others):
                del given[name]
        if "rope_freq" in given and rope_freq is None:
            given["rope_freq"] = _ROPE_FREQ
        if "pad_token_index" in given:
            given["pad_token_id"] = given.pop("pad_token_index")
        lengths = {
            "context_length": context_length,
            "max_position_embeddings": max_position_embeddings,
        }
        ends = {
            "bos_token_id": None,
            "eos_token_id": None,
        }  # transformers' 1 and 2 are Llama 2's, and words of Llama 3
        super().__init__(
            vocab_size=vocab_size, rms_norm_eps=rms_norm_eps, **lengths, **given, **ends | kwargs
        )
        self.context_length, self.max_position_embeddings = (
            lengths.values()
        )  # the package keeps the larger; scripts read both


_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(LLAMA32Config).parameters.items()
}


class DictConfig(MllamaTextConfig):
    """A plain dict of `LLAMA32_CONFIG`'s keys, as the package's config. Further keys are left
    alone.

    Raises:
        ValueError: a key is missing, or a value cannot be; the text names it.
    """

    has_no_defaults_at_init = True

    def __init__(self, cfg: Mapping[str, Any]):
        if missing := [name for name in LLAMA32_CONFIG if name not in cfg]:
            raise ValueError(
                f"cfg: missing {', '.join(missing)}; its keys are those of LLAMA32_CONFIG"
            )
        super().__init__(
            **{name: cfg[name] for name in LLAMA32_CONFIG}, rms_norm_eps=1e-5
        )  # Llama 3.2's; the dict carries none


def text_config(config: Mapping[str, Any] | MllamaTextConfig) -> MllamaTextConfig:
    """The package's config of what a script gave to a class of the decoder.

    Raises:
        TypeError: it is neither a dict nor a config of text.
        ValueError: a value in it cannot be, or is none of the older decoder's.
    """
    if isinstance(config, Mapping):
        config = DictConfig(config)
    if not isinstance(config, MllamaTextConfig):
        raise TypeError(
            f"config must be a LLAMA32Config or a dict as LLAMA32_CONFIG, got {type(config).__name__}"
        )
    if config.dtype not in (*FLOAT_DTYPES, None):
        raise ValueError(
            f"config: dtype must be one of {', '.join(map(str, FLOAT_DTYPES))}, got {config.dtype}"
        )
    fixed = _LLAMA | {"head_dim": config.hidden_size // config.num_attention_heads}
    if other := [name for name, value in fixed.items() if getattr(config, name) != value]:
        raise ValueError(
            f"config: {other[0]} must be {fixed[other[0]]!r} in the older decoder, got {getattr(config, other[0])!r}"
        )
    return config
