"""Configurations of older scripts."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

import mllama
from mllama.hf import names
from mllama.hf.configs import MllamaTextConfig
from mllama.hf.names import PretrainedConfig

LLAMA32_CONFIG = {  # Llama 3.2 1B
    "vocab_size": 128_256,
    "context_length": 131_072,
    "emb_dim": 2048,
    "n_heads": 32,
    "n_layers": 16,
    "hidden_dim": 8192,
    "n_kv_groups": 8,
    "rope_base": 500_000.0,
    "dtype": torch.bfloat16,
    "rope_freq": {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_context_length": 8192,
    },
}
_LLAMA32 = copy.deepcopy(LLAMA32_CONFIG)  # scripts write into the dict
NAMES = {  # older names of transformers' fields
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_kv_groups": "num_key_value_heads",
    "context_length": "max_position_embeddings",
    "pad_token_index": "pad_token_id",
}
_SPELLINGS = NAMES | {
    "rope_base": "rope_theta",
    "rope_scaling": "rope_parameters",
    "torch_dtype": "dtype",
}
_DEFAULTS = {
    **{NAMES[name]: value for name, value in _LLAMA32.items() if name in NAMES},
    "hidden_size": 4096,
    "rms_norm_eps": 1e-5,
    "dtype": torch.float16,
    "bos_token_id": None,  # LlamaConfig's 1 and 2 are words of Llama 3
    "eos_token_id": None,
}


def rope_scaling(freq_config: Mapping[str, float] | None) -> dict[str, Any]:
    """Frequency scaling as transformers writes it, of the older dict; None scales nothing."""
    if freq_config is None:
        return {"rope_type": "default"}
    if not isinstance(freq_config, Mapping):
        raise ValueError(f"rope_freq must be a dict or None, got {freq_config!r}")
    scaling = {"rope_type": "llama3"} | dict(freq_config)
    if "original_context_length" in scaling:
        scaling["original_max_position_embeddings"] = scaling.pop("original_context_length")
    return scaling


class LLAMA32Config(MllamaTextConfig):
    """A decoder's config with the older names and defaults; transformers' names work too.

    Args:
        vocab_size, hidden_size: sizes.
        fields: n_heads, n_layers, hidden_dim, n_kv_groups, rms_norm_eps, dtype, pad_token_index;
            context_length and max_position_embeddings, whose larger value is the model's maximum
            length; rope_base and rope_freq, base (default 500000.0) and frequency scaling
            (default Llama 3.2's) of the rotary embedding.

    Raises:
        ValueError: a size that cannot be, or one field under two names with two values.
    """

    attribute_map = dict(NAMES)

    def __init__(self, vocab_size: int, hidden_size: int | None = None, **fields: Any):
        fields = {"hidden_size": hidden_size} | fields
        fields = {name: value for name, value in fields.items() if value is not None}
        if "context_length" in fields and "max_position_embeddings" in fields:
            longest = max(fields.pop("context_length"), fields["max_position_embeddings"])
            fields["max_position_embeddings"] = longest
        for older in _SPELLINGS.keys() & fields.keys():
            name, value = _SPELLINGS[older], fields.pop(older)
            if fields.setdefault(name, value) != value:
                raise ValueError(f"{older} = {value!r} and {name} = {fields[name]!r} are one field")
        if "rope_parameters" not in fields:  # beside it, rope_freq is rejected
            freq = fields.pop("rope_freq", _LLAMA32["rope_freq"])
            fields["rope_parameters"] = rope_scaling(freq)
        scaling = dict(fields["rope_parameters"])
        base = fields.pop("rope_theta", scaling.get("rope_theta", _LLAMA32["rope_base"]))
        if scaling.setdefault("rope_theta", base) != base:
            raise ValueError(f"rope_base = {base!r}, but rope_parameters have another rope_theta")
        fields["rope_parameters"] = scaling
        super().__init__(vocab_size=vocab_size, **_DEFAULTS | fields)


def text_config(config: Mapping[str, Any] | PretrainedConfig) -> PretrainedConfig:
    """The config of a decoder built from a dict as LLAMA32_CONFIG, or from a config.

    Raises:
        TypeError: neither of them.
        ValueError: a missing key, or a value that the older decoder cannot have.
    """
    if isinstance(config, Mapping):
        if missing := [name for name in _LLAMA32 if name not in config]:
            raise ValueError(f"cfg has no {', '.join(missing)}; LLAMA32_CONFIG shows its keys")
        given = {name: config[name] for name in _LLAMA32}
        given["rope_parameters"] = rope_scaling(given.pop("rope_freq"))
        config = LLAMA32Config(**given)
    if not isinstance(config, names.LlamaConfig):
        kind = type(config).__name__
        raise TypeError(f"config must be a LLAMA32Config or a dict as LLAMA32_CONFIG, got {kind}")
    fixed = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "norm_offset": 0}
    fixed |= {"embedding_scale": None, "cross_attention_layers": None}
    fixed["head_dim"] = config.hidden_size // config.num_attention_heads
    for name, value in fixed.items():
        if getattr(config, name, value) != value:
            found = getattr(config, name)
            raise ValueError(f"{name} must be {value!r} in the older decoder, got {found!r}")
    return config


class MLLAMAConfig(mllama.MllamaConfig):
    """A SigLIP encoder, one linear layer and a Llama decoder.

    Args:
        vision_config, text_config: dicts, configs or objects with such attributes; a decoder's
            dict is completed as by `LLAMA32Config`. Default: SigLIP-base and Llama 3.2 1B.
        vocab_size, hidden_size, pad_token_index: of a decoder whose config does not say.
        kwargs: as `mllama.MllamaConfig`. Without `image_token_index`, the first prompt with an
            image tells it. `projection_dim` is for projector="mlp": one linear layer is as wide as
            the decoder. `dtype` is the decoder's by default.

    Raises:
        ValueError: a size or choice that cannot be. TypeError: a sub-config of another type.
    """

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        *,
        vocab_size: int = 128256,
        hidden_size: int = 2048,
        pad_token_index: int | None = None,
        **kwargs: Any,
    ):
        text = {"hidden_size": hidden_size} if text_config is None else _fields(text_config)
        if isinstance(text, dict):
            text = LLAMA32Config(
                **{"vocab_size": vocab_size, "pad_token_index": pad_token_index} | text
            )
        vision = _fields(vision_config)
        if isinstance(vision, dict):
            vision = {NAMES.get(name, name): value for name, value in vision.items()}
        kwargs = {"projector": "linear"} | kwargs
        if kwargs["projector"] == "linear":  # as wide as the decoder
            kwargs.pop("projection_dim", None)
        super().__init__(vision, text, **kwargs)
        if isinstance(text, LLAMA32Config):  # a copy: a model writes into its own
            settled, self.text_config = self.text_config, copy.deepcopy(text)
            for name in ("num_image_tokens", "tie_word_embeddings"):
                setattr(self.text_config, name, getattr(settled, name))
        if self.dtype is None:
            self.dtype = self.text_config.dtype

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """A `mllama.MllamaConfig`, whose defaults complete what a folder says."""
        return mllama.MllamaConfig.from_dict(config_dict, **kwargs)

    def to_diff_dict(self) -> dict[str, Any]:
        """What config.json gets: a `mllama.MllamaConfig`'s."""
        return mllama.MllamaConfig(**self.to_dict()).to_diff_dict()


def _fields(given: Any) -> dict[str, Any] | PretrainedConfig | None:
    """A sub-config as dict or config; any other object by its attributes."""
    if given is None or isinstance(given, PretrainedConfig):
        return given
    if not isinstance(given, dict) and not hasattr(given, "__dict__"):
        raise TypeError(f"a sub-config must be a dict or an object, got {type(given).__name__}")
    return dict(given if isinstance(given, dict) else vars(given))
