"""LLaVA on disk: a SigLIP or CLIP tower, an MLP and a Llama."""

from typing import Any

from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, SiglipVisionConfig

from mllama.config.files import build, content_of
from mllama.weights.format import Format
from mllama.weights.rows import Drop, Rename

TOWERS = (
    "vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
)

TABLE = (
    # Patches are read; a released SigLIP tower's pooling head has no part in it. Positions and
    # frequencies are computed.
    *(Drop(f"{tower}{part}") for tower in TOWERS for part in ("head.*", "embeddings.position_ids")),
    Drop("language_model.model.layers.{}.self_attn.rotary_emb.inv_freq"),
    # `also`: what transformers 5 writes, and its names in memory.
    *(
        Rename(
            f"vision_tower.{part}.*",
            f"{TOWERS[0]}{part}.*",
            also=[f"{tower}{part}.*" for tower in TOWERS[1:]],
        )
        for part in ("embeddings", "pre_layrnorm", "encoder", "post_layernorm")
    ),
    Rename(
        "multi_modal_projector.*",
        "multi_modal_projector.*",
        also=("model.multi_modal_projector.*",),
    ),
    Rename("language_model.*", "language_model.model.*", also=("model.language_model.*",)),
    Rename("lm_head.weight", "language_model.lm_head.weight", also=("lm_head.weight",)),
)


def from_file(content: dict[str, Any]) -> LlavaConfig:
    """Raises ValueError for what cannot be: another tower or decoder among it."""
    config = build(
        LlavaConfig,
        content,
        {"vision_config": (CLIPVisionConfig, SiglipVisionConfig), "text_config": (LlamaConfig,)},
    )
    config.text_config.tie_word_embeddings = config.tie_word_embeddings  # either ties
    return config


def to_file(config: LlavaConfig) -> dict[str, Any]:
    """The content of a config.json."""
    content = content_of(config, "LlavaForConditionalGeneration")
    if content["vision_config"]["model_type"] == "siglip_vision_model":
        content["vision_config"]["vision_use_head"] = False  # it is not written
    return content


FORMAT = Format(LlavaConfig, lambda config: TABLE, from_file, to_file)
