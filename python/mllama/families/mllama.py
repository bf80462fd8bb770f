"""Llama-3.2-Vision on disk: a tiled ViT, one linear layer and a Llama with cross-attention layers."""

from typing import Any

from transformers import MllamaConfig
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from mllama.config.files import build, content_of
from mllama.weights.format import Format
from mllama.weights.rows import Rename

# `also`: the names in transformers 5's memory.
TABLE = (
    Rename("vision_tower.*", "vision_model.*", also=("model.vision_model.*",)),
    Rename(
        "multi_modal_projector.linear.*",
        "multi_modal_projector.*",
        also=("model.multi_modal_projector.*",),
    ),
    Rename("language_model.*", "language_model.model.*", also=("model.language_model.*",)),
    Rename("lm_head.weight", "language_model.lm_head.weight", also=("lm_head.weight",)),
)


def from_file(content: dict[str, Any]) -> MllamaConfig:
    """Raises ValueError for what cannot be."""
    return build(
        MllamaConfig,
        content,
        {"vision_config": (MllamaVisionConfig,), "text_config": (MllamaTextConfig,)},
    )


def to_file(config: MllamaConfig) -> dict[str, Any]:
    """The content of a config.json."""
    return content_of(config, "MllamaForConditionalGeneration")


FORMAT = Format(MllamaConfig, lambda config: TABLE, from_file, to_file)
