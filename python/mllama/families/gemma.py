"""Gemma 1 on disk: text alone, with Llama's names."""

from typing import Any

from transformers import GemmaConfig

from mllama.config.files import build, content_of
from mllama.families import llama
from mllama.weights.format import Format


def from_file(content: dict[str, Any]) -> GemmaConfig:
    """Raises ValueError for what cannot be."""
    return build(GemmaConfig, content)


def to_file(config: GemmaConfig) -> dict[str, Any]:
    """The content of a config.json."""
    return content_of(config, "GemmaForCausalLM")


FORMAT = Format(GemmaConfig, lambda config: llama.TABLE, from_file, to_file)
