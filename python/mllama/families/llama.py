"""Llama 3.x on disk: text alone."""

from typing import Any

from transformers import LlamaConfig

from mllama.config.files import build, content_of
from mllama.weights.format import Format
from mllama.weights.rows import Drop, Rename

TABLE = (
    # Computed; old files hold it.
    Drop("model.layers.{}.self_attn.rotary_emb.inv_freq"),
    Drop("layers.{}.self_attn.rotary_emb.inv_freq"),
    # `also`: transformers' class of the decoder without a head.
    *(
        Rename(f"language_model.{part}.*", f"model.{part}.*", also=(f"{part}.*",))
        for part in ("embed_tokens", "layers", "norm")
    ),
    Rename("lm_head.weight", "lm_head.weight"),
)


def from_file(content: dict[str, Any]) -> LlamaConfig:
    """Raises ValueError for what cannot be."""
    return build(LlamaConfig, content)


def to_file(config: LlamaConfig) -> dict[str, Any]:
    """The content of a config.json."""
    return content_of(config, "LlamaForCausalLM")


FORMAT = Format(LlamaConfig, lambda config: TABLE, from_file, to_file)
