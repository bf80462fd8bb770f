"""PaliGemma 1 on disk: a SigLIP tower, one linear layer and a Gemma, under LLaVA's names."""

from typing import Any

from transformers import GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

from mllama.config.files import build, content_of
from mllama.families import llava
from mllama.weights.format import Format


def from_file(content: dict[str, Any]) -> PaliGemmaConfig:
    """Raises ValueError for what cannot be: PaliGemma 2, whose decoder is a Gemma 2, among it."""
    config = build(
        PaliGemmaConfig,
        content,
        {"vision_config": (SiglipVisionConfig,), "text_config": (GemmaConfig,)},
    )
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    return config


def to_file(config: PaliGemmaConfig) -> dict[str, Any]:
    """The content of a config.json."""
    content = content_of(config, "PaliGemmaForConditionalGeneration")
    content["vision_config"]["vision_use_head"] = False
    return content


FORMAT = Format(PaliGemmaConfig, lambda config: llava.TABLE, from_file, to_file)
