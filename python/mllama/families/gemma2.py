"""Gemma 2 on disk: text alone, with Llama's names."""

from typing import Any

from transformers import Gemma2Config

from mllama.config.files import build, content_of
from mllama.families import llama
from mllama.weights.format import Format


def from_file(content: dict[str, Any]) -> Gemma2Config:
    """Raises ValueError for what cannot be."""
    return build(Gemma2Config, content)


def to_file(config: Gemma2Config) -> dict[str, Any]:
    """The content of a config.json."""
    return content_of(config, "Gemma2ForCausalLM")


FORMAT = Format(Gemma2Config, lambda config: llama.TABLE, from_file, to_file)
