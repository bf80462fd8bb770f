"""SigLIP: a vision model alone, or the vision part of a whole SigLIP."""

from mllama.config.parts import vision_spec
from mllama.config.spec import ModelSpec
from mllama.weights.family import Config, Family
from mllama.weights.rows import Drop, Rename, Split, WeightMap

DEFAULTS: Config = {
    "model_type": "siglip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "gelu_pytorch_tanh",
    "layer_norm_eps": 1e-6,
    "attention_dropout": 0.0,
    "vision_use_head": True,
}

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


def _weight_map(spec: ModelSpec) -> WeightMap:
    """The rows of a vision model, with its pooling head if it has one. Transformers 5 omits
    `vision_model.`.
    """
    return (
        # Tensors of the text model, and computed ones.
        *(
            Drop(theirs)
            for theirs in (
                "text_model.*",
                "logit_scale",
                "logit_bias",
                "vision_model.embeddings.position_ids",
            )
        ),
        *(_HEAD if spec.vision.vision_use_head else _NO_HEAD),
        *(
            Rename(f"vision_tower.{part}.*", f"vision_model.{part}.*", also=(f"{part}.*",))
            for part in _PARTS
        ),
    )


def _read(config: Config) -> ModelSpec:
    return ModelSpec(text=None, encoder="siglip", vision=vision_spec(config, "config"))


def _vision_part(content: Config) -> Config:
    """The vision model's config in a SigLIP that has a text model too."""
    part = content.get("vision_config")
    part = {} if part is None else part
    kind = part.get("model_type", FAMILY.name) if isinstance(part, dict) else part
    if kind != FAMILY.name:
        raise ValueError(
            f"a vision_config of model_type {kind!r} is not supported; {FAMILY.name!r} is"
        )
    return part | {"model_type": FAMILY.name}


FAMILY = Family(
    name="siglip_vision_model",
    defaults=DEFAULTS,
    read=_read,
    weight_map=_weight_map,
    stock_class="SiglipVisionModel",
    processor="images",
    stock_processor="SiglipProcessor",
    also={"siglip": _vision_part},
)
