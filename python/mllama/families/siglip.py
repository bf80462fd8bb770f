"""SigLIP on disk: the vision model alone, or the vision part of the whole."""

from typing import Any

from transformers import SiglipConfig, SiglipTextConfig, SiglipVisionConfig

from mllama.config.files import build, content_of
from mllama.weights.format import Format
from mllama.weights.rows import Drop, Rename, Split, Table

_PARTS = ("embeddings", "encoder", "post_layernorm")
_HEAD = (
    *(
        Split(
            [f"head.attention.{part}_proj.{kind}" for part in "qkv"],
            f"vision_model.head.attention.in_proj_{kind}",
            also=(f"head.attention.in_proj_{kind}",),
        )
        for kind in ("weight", "bias")
    ),
    Rename("head.*", "vision_model.head.*", also=("head.*",)),
)
_NO_HEAD = (Drop("vision_model.head.*"), Drop("head.*"))


def table(config: SiglipVisionConfig) -> Table:
    """The rows of a vision model, with its pooling head where it has one. Transformers 5 leaves
    `vision_model.` out.
    """
    return (
        # What is no part of the vision model, and what is computed.
        *(
            Drop(theirs)
            for theirs in (
                "text_model.*",
                "logit_scale",
                "logit_bias",
                "vision_model.embeddings.position_ids",
            )
        ),
        *(_HEAD if config.vision_use_head else _NO_HEAD),
        *(
            Rename(f"vision_tower.{part}.*", f"vision_model.{part}.*", also=(f"{part}.*",))
            for part in _PARTS
        ),
    )


def from_file(content: dict[str, Any]) -> SiglipVisionConfig:
    """Raises ValueError for what cannot be."""
    return build(SiglipVisionConfig, content)


def from_whole(content: dict[str, Any]) -> SiglipVisionConfig:
    """The vision part's config of a SigLIP with both towers. Raises ValueError for what cannot be."""
    return build(
        SiglipConfig,
        content,
        {"vision_config": (SiglipVisionConfig,), "text_config": (SiglipTextConfig,)},
    ).vision_config


def to_file(config: SiglipVisionConfig) -> dict[str, Any]:
    """The content of a config.json."""
    return content_of(config, "SiglipVisionModel")


FORMAT = Format(SiglipVisionConfig, table, from_file, to_file)
WHOLE = Format(SiglipVisionConfig, table, from_whole, to_file)
