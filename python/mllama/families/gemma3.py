"""Gemma 3 on disk: text alone, with Llama's names."""

from typing import Any

from transformers import Gemma3TextConfig

from mllama.config.files import build, content_of
from mllama.families import llama
from mllama.weights.format import Format


def from_file(content: dict[str, Any]) -> Gemma3TextConfig:
    """Raises ValueError for what cannot be."""
    return build(Gemma3TextConfig, content)


def to_file(config: Gemma3TextConfig) -> dict[str, Any]:
    """The content of a config.json: the two ropes in the older spelling, where it can tell them."""
    content = content_of(config, "Gemma3ForCausalLM")
    ropes = content.get("rope_parameters") or {}
    if ropes and ropes["sliding_attention"]["rope_type"] == "default":
        del content["rope_parameters"]
        full = dict(ropes["full_attention"])
        content["rope_theta"] = full.pop("rope_theta")
        content["rope_local_base_freq"] = ropes["sliding_attention"]["rope_theta"]
        content["rope_scaling"] = None if full["rope_type"] == "default" else full
    return content


FORMAT = Format(Gemma3TextConfig, lambda config: llama.TABLE, from_file, to_file)
