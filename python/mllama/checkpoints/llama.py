"""Llama 3.x on disk: text alone."""

from typing import Any

from transformers import LlamaConfig

from mllama.checkpoints.configs import build, content_of
from mllama.checkpoints.engine import Drop, Rename
from mllama.checkpoints.formats import Format

TABLE = (
    Drop("model.layers.{}.self_attn.rotary_emb.inv_freq"),  # computed; old files hold it
    Rename("language_model.*", "model.*"),
    Rename("lm_head.weight", "lm_head.weight"),
)


def from_file(content: dict[str, Any]) -> LlamaConfig:
    """Raises ValueError for what cannot be."""
    return build(LlamaConfig, content)


def to_file(config: LlamaConfig) -> dict[str, Any]:
    """The content of a config.json."""
    return content_of(config, "LlamaForCausalLM")


FORMAT = Format(LlamaConfig, lambda config: TABLE, from_file, to_file)
