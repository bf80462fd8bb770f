"""PaliGemma 1 and 2 on disk: a SigLIP encoder, one linear layer and a Gemma or Gemma 2, under
LLaVA's names.
"""

from typing import Any

from transformers import Gemma2Config, GemmaConfig, PaliGemmaConfig, SiglipVisionConfig

from mllama.config.files import build, content_of
from mllama.families import llava
from mllama.weights.format import Format


def from_file(content: dict[str, Any]) -> PaliGemmaConfig:
    """Raises ValueError for what cannot be."""
    config = build(
        PaliGemmaConfig,
        content,
        {"vision_config": (SiglipVisionConfig,), "text_config": (GemmaConfig, Gemma2Config)},
    )
    config.text_config.tie_word_embeddings = config.tie_word_embeddings
    return config


def to_file(config: PaliGemmaConfig) -> dict[str, Any]:
    """The content of a config.json."""
    content = content_of(config, "PaliGemmaForConditionalGeneration")
    content["vision_config"]["vision_use_head"] = False
    return content


FORMAT = Format(PaliGemmaConfig, lambda config: llava.TABLE, from_file, to_file)
