"""LLaVA: a SigLIP or CLIP encoder, an MLP projector and a Llama."""

from mllama.config.checks import ACTIVATIONS, check_choice, check_flag, check_size
from mllama.config.files import to_older
from mllama.config.parts import select_features, text_spec, vision_spec
from mllama.config.spec import ModelSpec, count_patches
from mllama.families import llama, siglip
from mllama.weights.family import Config, Family
from mllama.weights.rows import Drop, Rename

CLIP: Config = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 32,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "attention_dropout": 0.0,
}
DEFAULTS: Config = {
    "vision_config": CLIP
    | {
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
    },
    "text_config": llama.DEFAULTS,
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}

ENCODERS = (
    "vision_tower.vision_model.",
    "vision_tower.",
    "model.vision_tower.vision_model.",
    "model.vision_tower.",
)
WEIGHT_MAP = (
    # Patch features are read, so a released SigLIP's pooling head is unused. Positions and
    # frequencies are computed.
    *(
        Drop(f"{encoder}{part}")
        for encoder in ENCODERS
        for part in ("head.*", "embeddings.position_ids")
    ),
    Drop("language_model.model.layers.{}.self_attn.rotary_emb.inv_freq"),
    # `also`: names written by transformers 5, and its names in memory.
    *(
        Rename(
            f"vision_tower.{part}.*",
            f"{ENCODERS[0]}{part}.*",
            also=[f"{encoder}{part}.*" for encoder in ENCODERS[1:]],
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
STOCK_PREFIXES = tuple(
    (part, f"model.{part}") for part in ("vision_tower", "multi_modal_projector", "language_model")
)


def check_image_token(config: Config) -> int | None:
    """The placeholder's id, which may lie outside the vocabulary. Raises ValueError if invalid."""
    if config["image_token_index"] is not None:
        check_size("config", "image_token_index", config["image_token_index"], minimum=0)
    return config["image_token_index"]


def _tie(config: Config) -> Config:
    """Tie if this config or the decoder's says so."""
    text = config["text_config"]
    tied = config["tie_word_embeddings"] or text["tie_word_embeddings"]
    return config | {
        "tie_word_embeddings": tied,
        "text_config": text | {"tie_word_embeddings": tied},
    }


def _read(config: Config) -> ModelSpec:
    is_clip = config["vision_config"]["model_type"] == "clip_vision_model"
    if is_clip:  # transformers' CLIP is causal with one of these settings
        for owner, part in (("config", config), ("vision_config", config["vision_config"])):
            check_choice(owner, "is_causal", part.get("is_causal"), (False, None))
    vision = vision_spec(config["vision_config"] | {"vision_use_head": False})
    text = text_spec(config["text_config"], llama.DEFAULTS)
    layers, skip = select_features(
        config["vision_feature_layer"],
        config["vision_feature_select_strategy"],
        vision.num_hidden_layers + 1,
    )
    check_choice("config", "projector_hidden_act", config["projector_hidden_act"], ACTIVATIONS)
    check_flag("config", "multimodal_projector_bias", config["multimodal_projector_bias"])
    tokens = count_patches(vision) + is_clip - skip
    if tokens < 1:
        raise ValueError(
            "vision_feature_select_strategy 'default' drops the only feature of an encoder"
        )
    return ModelSpec(
        text=text,
        encoder="clip" if is_clip else "siglip",
        vision=vision,
        feature_layers=layers,
        skip_first=skip,
        selects_features=True,
        projector="mlp",
        projector_sizes=(vision.hidden_size * len(layers), text.hidden_size, text.hidden_size),
        projector_act=config["projector_hidden_act"],
        projector_bias=config["multimodal_projector_bias"],
        fusion="merge",
        tokens_per_image=tokens,
        image_token_index=check_image_token(config),
    )


def write(config: Config) -> Config:
    """Config -> content of config.json, for a family with a SigLIP without its head."""
    content = to_older(config)
    if content["vision_config"]["model_type"] == "siglip_vision_model":
        content["vision_config"]["vision_use_head"] = False
    return content


FAMILY = Family(
    name="llava",
    defaults=DEFAULTS,
    parts={"vision_config": (CLIP, siglip.DEFAULTS), "text_config": (llama.DEFAULTS,)},
    read=_read,
    settle=_tie,
    weight_map=lambda spec: WEIGHT_MAP,
    stock_class="LlavaForConditionalGeneration",
    processor="merged",
    stock_processor="LlavaProcessor",
    stock_prefixes=STOCK_PREFIXES,
    write=write,
)
