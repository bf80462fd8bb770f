"""Llama-3.2-Vision: a tiled ViT, one linear layer and a Llama with cross-attention layers."""

from mllama.config.parts import check_cross_layers, text_spec, tiled_spec
from mllama.config.spec import ModelSpec
from mllama.families.llava import check_image_token
from mllama.weights.family import Config, Family
from mllama.weights.rows import Rename

EXTRA_EMBEDDINGS = 8  # rows after the vocabulary; the first is the placeholder's
TEXT: Config = {
    "model_type": "mllama_text_model",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 40,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "pad_token_id": 128004,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
    "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38],
    "dropout": 0.0,
}
VISION: Config = {
    "model_type": "mllama_vision_model",
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "num_channels": 3,
    "image_size": 448,
    "patch_size": 14,
    "hidden_act": "gelu",
    "norm_eps": 1e-5,
    "max_num_tiles": 4,
    "vision_output_dim": 7680,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
    "supported_aspect_ratios": [*([1, 1], [1, 2], [1, 3], [1, 4], [2, 1], [2, 2], [3, 1], [4, 1])],
}
DEFAULTS: Config = {"vision_config": VISION, "text_config": TEXT, "image_token_index": 128256}
# `also`: names in transformers 5's memory.
WEIGHT_MAP = (
    Rename("vision_tower.*", "vision_model.*", also=("model.vision_model.*",)),
    Rename(
        "multi_modal_projector.linear.*",
        "multi_modal_projector.*",
        also=("model.multi_modal_projector.*",),
    ),
    Rename("language_model.*", "language_model.model.*", also=("model.language_model.*",)),
    Rename("lm_head.weight", "language_model.lm_head.weight", also=("lm_head.weight",)),
)


def _read(config: Config) -> ModelSpec:
    text = text_spec(
        config["text_config"],
        TEXT,
        cross=check_cross_layers(config["text_config"]),
        extra_embeddings=EXTRA_EMBEDDINGS,
        tie_word_embeddings=False,  # the embedding matrix has more rows than the head
    )
    vision = tiled_spec(config["vision_config"])
    return ModelSpec(
        text=text,
        encoder="tiled",
        vision=vision,
        projector="linear",
        projector_sizes=(vision.vision_output_dim, 0, text.hidden_size),
        fusion="tiled_cross_attention",
        image_token_index=check_image_token(config),
    )


FAMILY = Family(
    name="mllama",
    defaults=DEFAULTS,
    parts={"vision_config": (VISION,), "text_config": (TEXT,)},
    read=_read,
    weight_map=lambda spec: WEIGHT_MAP,
    stock_class="MllamaForConditionalGeneration",
    processor="tiled",
    stock_processor="MllamaProcessor",
    stock_prefixes=(
        ("vision_tower", "model.vision_model"),
        ("multi_modal_projector.linear", "model.multi_modal_projector"),
        ("multi_modal_projector", "model.multi_modal_projector"),
        ("language_model", "model.language_model"),
    ),
)
