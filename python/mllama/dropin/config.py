"""Configurations of older scripts."""

import copy
from collections.abc import Mapping
from typing import Any

import torch

import mllama
from mllama.hf import names
from mllama.hf.configs import MllamaTextConfig
from mllama.hf.names import PretrainedConfig

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = {  # older names of transformers' fields
    "emb_dim": "hidden_size",
    "n_heads": "num_attention_heads",
    "n_layers": "num_hidden_layers",
    "hidden_dim": "intermediate_size",
    "n_kv_groups": "num_key_value_heads",
    "pad_token_index": "pad_token_id",
}
_ROPE_FREQ = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context_length": 8192,
}
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
    "rope_freq": dict(_ROPE_FREQ),
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


_SPELLINGS = NAMES | {
    "rope_base": "rope_theta",
    "rope_scaling": "rope_parameters",
    "torch_dtype": "dtype",
}
_DEFAULTS = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_hidden_layers": 16,
    "intermediate_size": 8192,
    "num_key_value_heads": 8,
    "context_length": 131072,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "dtype": torch.float16,
    "bos_token_id": None,  # LlamaConfig's 1 and 2 are words of Llama 3
    "eos_token_id": None,
}


class LLAMA32Config(MllamaTextConfig):
    """A decoder's config with the older names and defaults; transformers' names work too.

    Args:
        vocab_size, hidden_size: sizes.
        fields: n_heads, n_layers, hidden_dim, n_kv_groups, rms_norm_eps, dtype, pad_token_index;
            context_length, the most tokens that the model takes; max_position_embeddings, only
            stored; rope_base and rope_freq, base (default 500000.0) and frequency scaling (default
            Llama 3.2's) of the rotary embedding.

    Raises:
        ValueError: a size that cannot be, or one field under two names with two values.
    """

    attribute_map = dict(NAMES)
    has_no_defaults_at_init = True  # vocab_size has none

    def __init__(self, vocab_size: int, hidden_size: int | None = None, **fields: Any):
        fields = {"hidden_size": hidden_size} | fields
        fields = {name: value for name, value in fields.items() if value is not None}
        for older in _SPELLINGS.keys() & fields.keys():
            name, value = _SPELLINGS[older], fields.pop(older)
            if fields.setdefault(name, value) != value:
                raise ValueError(f"{older} = {value!r} and {name} = {fields[name]!r} are one field")
        freq, base = fields.pop("rope_freq", None), fields.pop("rope_theta", None)
        scaling = fields.pop("rope_parameters", None)
        if scaling and freq is not None:
            raise ValueError("give one of rope_freq and rope_parameters")
        scaling = dict(scaling or rope_scaling(_ROPE_FREQ if freq is None else freq))
        if scaling.setdefault("rope_theta", base or 500000.0) != (base or scaling["rope_theta"]):
            raise ValueError(f"rope_base = {base!r}, but rope_parameters have another rope_theta")
        fields = _DEFAULTS | fields | {"rope_parameters": scaling}
        lengths = {name: fields.pop(name) for name in ("context_length", "max_position_embeddings")}
        for name, length in lengths.items():
            if isinstance(length, bool) or not isinstance(length, int) or length < 1:
                raise ValueError(f"{name} must be an integer of at least 1, got {length!r}")
        fields["max_position_embeddings"] = max(lengths.values())
        super().__init__(vocab_size=vocab_size, **fields)
        self.context_length, self.max_position_embeddings = lengths.values()

    def to_dict(self) -> dict[str, Any]:
        """As transformers', with the longer of the two lengths under its name."""
        content = super().to_dict()
        lengths = (content.pop("context_length", 0), content["max_position_embeddings"])
        return content | {"max_position_embeddings": max(lengths)}

    @property
    def rope_base(self) -> float:
        """Base of the rotary frequencies."""
        return self.rope_parameters["rope_theta"]

    @property
    def rope_freq(self) -> dict[str, float] | None:
        """Llama 3's frequency scaling, None where the frequencies are not scaled."""
        if self.rope_parameters["rope_type"] != "llama3":
            return None
        names = dict(zip(_ROPE_FREQ, _ROPE_FREQ, strict=True))
        names["original_context_length"] = "original_max_position_embeddings"
        return {older: self.rope_parameters[name] for older, name in names.items()}


def text_config(config: Mapping[str, Any] | PretrainedConfig) -> PretrainedConfig:
    """The config of a decoder built from a dict as LLAMA32_CONFIG, or from a config.

    Raises:
        TypeError: neither of them.
        ValueError: a missing key, or a value that the older decoder cannot have.
    """
    if isinstance(config, Mapping):
        if missing := [name for name in LLAMA32_CONFIG if name not in config]:
            raise ValueError(f"cfg has no {', '.join(missing)}; LLAMA32_CONFIG shows its keys")
        given = {name: config[name] for name in LLAMA32_CONFIG}
        base = {"rope_theta": given.pop("rope_base")}
        given["rope_parameters"] = rope_scaling(given.pop("rope_freq")) | base
        config = LLAMA32Config(**given)
    if not isinstance(config, names.LlamaConfig):
        kind = type(config).__name__
        raise TypeError(f"config must be a LLAMA32Config or a dict as LLAMA32_CONFIG, got {kind}")
    if config.dtype not in (*DTYPES, None):
        raise ValueError(f"dtype must be one of {', '.join(map(str, DTYPES))}, got {config.dtype}")
    fixed = {"attention_bias": False, "mlp_bias": False, "hidden_act": "silu", "norm_offset": 0}
    fixed |= {"embedding_scale": None, "cross_attention_layers": None}
    fixed["head_dim"] = config.hidden_size // config.num_attention_heads
    for name, value in fixed.items():
        if getattr(config, name, value) != value:
            found = getattr(config, name)
            raise ValueError(f"{name} must be {value!r} in the older decoder, got {found!r}")
    return config


class Unset(int):
    """An `image_token_index` that no script gave: reads as the number, and is found in prompts."""


class MLLAMAConfig(mllama.MllamaConfig):
    """A SigLIP encoder, one linear layer and a Llama decoder.

    Args:
        vision_config, text_config: dicts, configs or any objects with such attributes; a decoder's
            dict is completed as by `LLAMA32Config`. Default: SigLIP-base and Llama 3.2 1B.
        ignore_index: label that is not trained.
        image_token_index: id of `<image>`. Unless it is given, prompts tell it (128256 is read).
        vocab_size, hidden_size, pad_token_index: of a decoder whose config does not say.
        projection_dim: only stored; the projector's width is the decoder's.
        kwargs: as `mllama.MllamaConfig`. `dtype` is the decoder's by default.

    Raises:
        ValueError: a size or choice that cannot be. TypeError: a sub-config of another type.
    """

    def __init__(
        self,
        vision_config: Any = None,
        text_config: Any = None,
        ignore_index: int = -100,
        image_token_index: int | None = Unset(128256),
        vocab_size: int = 128256,
        projection_dim: int | None = 2048,
        hidden_size: int = 2048,
        pad_token_index: int | None = None,
        **kwargs: Any,
    ):
        text = {"hidden_size": hidden_size} if text_config is None else _fields(text_config)
        if isinstance(text, dict):
            common = {"vocab_size": vocab_size, "pad_token_index": pad_token_index}
            text = LLAMA32Config(**common | text)
        elif isinstance(text, LLAMA32Config):
            text = copy.deepcopy(text)  # a model writes into its own
        vision = _fields(vision_config)
        if isinstance(vision, dict):
            vision = {NAMES.get(name, name): value for name, value in vision.items()}
        kwargs = {"projector": "linear"} | kwargs
        if image_token_index is None and kwargs.get("fusion", "merge") == "merge":
            image_token_index = Unset(128256)
        super().__init__(
            vision_config=vision,
            text_config=text,
            ignore_index=ignore_index,
            image_token_index=image_token_index,
            projection_dim=projection_dim if kwargs["projector"] == "mlp" else None,
            **kwargs,
        )
        if isinstance(text, LLAMA32Config):  # under the older names too
            for name in ("num_image_tokens", "tie_word_embeddings"):
                setattr(text, name, getattr(self.text_config, name))
            self.text_config = text
        if self.fusion != "merge" and isinstance(self.image_token_index, Unset):
            self.image_token_index = None
        if projection_dim is not None:
            self.projection_dim = projection_dim
        self.vision_config.projection_dim = self.projection_dim
        if self.dtype is None:
            self.dtype = self.text_config.dtype
        if self.dtype not in (*DTYPES, None):
            raise ValueError(
                f"dtype must be one of {', '.join(map(str, DTYPES))}, got {self.dtype}"
            )

    @classmethod
    def get_config_dict(cls, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """As `mllama.MllamaConfig`'s, whose defaults complete what a folder says."""
        content, unused = super().get_config_dict(*args, **kwargs)
        return {"projector": "mlp", "projection_dim": None} | content, unused

    def to_dict(self) -> dict[str, Any]:
        """As `mllama.MllamaConfig` takes it: an id that was not given is None."""
        content = super().to_dict()
        if isinstance(self.image_token_index, Unset):
            content["image_token_index"] = None
        if self.projector == "linear":
            content["projection_dim"] = self.text_config.hidden_size
        return content

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


class PaliGemmaConfig(names.PaliGemmaConfig):
    """transformers' PaliGemmaConfig; `ignore_index` is honored, SigLIP's pooling head left out."""

    def __init__(self, vision_config: Any = None, text_config: Any = None, **kwargs: Any):
        if isinstance(vision_config, dict):
            vision_config = {"vision_use_head": False} | vision_config
        super().__init__(vision_config=vision_config, text_config=text_config, **kwargs)
