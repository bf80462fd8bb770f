"""SigLIP + Llama, joined in one of three ways. Written as Hugging Face's LLaVA if the model has
that form, else with a config of its own and the same tensor names.
"""

from dataclasses import replace
from typing import Any

from mllama.config.checks import (
    ACTIVATIONS,
    CROSS_ATTENTION_EVERY,
    FUSIONS,
    POOLINGS,
    PROJECTORS,
    VISION_FEATURES,
    check_choice,
    check_flag,
    check_number,
    check_size,
)
from mllama.config.parts import check_cross_layers, text_spec, vision_spec
from mllama.config.spec import ModelSpec, TextSpec, count_patches
from mllama.families import llama, llava, siglip
from mllama.weights.family import Config, Family
from mllama.weights.rows import Rename

# Decoder fields in addition to Llama's.
OWN_TEXT: Config = {
    "num_image_tokens": None,
    "norm_offset": 0.0,
    "embedding_scale": None,
    "extra_embeddings": 0,
    "cross_attention_layers": None,
}
TEXT: Config = llama.DEFAULTS | OWN_TEXT
VISION: Config = siglip.DEFAULTS | {"vision_use_head": False}
DEFAULTS: Config = {
    "vision_config": VISION,
    "text_config": TEXT,
    "ignore_index": -100,
    "image_token_index": None,
    "projector": "mlp",
    "projection_dim": None,
    "projector_hidden_act": "gelu",
    "multimodal_projector_bias": True,
    "vision_feature": "last",
    "fusion": "merge",
    "num_image_tokens": None,
    "image_pooling": None,
    "cross_attention_every": None,
}
# Defaults for the decoder's own config: {name here: name there}.
FOR_TEXT = {
    "vocab_size": "vocab_size",
    "hidden_size": "hidden_size",
    "pad_token_index": "pad_token_id",
}
_ABOVE = ("tie_word_embeddings", "use_cache")
_OF_FUSION = {
    "num_image_tokens": "prepend",
    "image_pooling": "prepend",
    "cross_attention_every": "cross_attention",
}
# LLaVA has no pooling. Cross-attention layers are named like the decoder's others.
WEIGHT_MAP = (*llava.WEIGHT_MAP, Rename("image_pooling.*", "image_pooling.*"))


def _translate(content: Config) -> Config:
    """Move decoder settings from the top level into its config."""
    content, text = dict(content), content.get("text_config")
    above = {name: content.pop(name, None) for name in (*FOR_TEXT, *_ABOVE)}
    if not isinstance(text, (dict, type(None))):
        return content
    text = dict(text or {})
    for name, inner in FOR_TEXT.items():
        if above[name] is not None and text.get(inner) is None:
            text[inner] = above[name]
    if above["tie_word_embeddings"]:  # as in LLaVA: either setting ties
        text["tie_word_embeddings"] = above["tie_word_embeddings"]
    if above["use_cache"] is not None:
        text["use_cache"] = above["use_cache"]
    return content | {"text_config": text}


def check_text(config: Config) -> TextSpec:
    """The decoder's spec. Raises ValueError for invalid values."""
    check_choice("text_config", "norm_offset", config["norm_offset"], (0, 1))
    if config["embedding_scale"] is not None:
        check_number("text_config", "embedding_scale", config["embedding_scale"])
    check_size("text_config", "extra_embeddings", config["extra_embeddings"], minimum=0)
    return text_spec(config, TEXT, cross=check_cross_layers(config))


def _settle(config: Config) -> Config:
    """Fill in fields that follow from the fusion and the parts' sizes."""
    vision, text = vision_spec(config["vision_config"]), check_text(config["text_config"])
    patches, layers = count_patches(vision), text.num_hidden_layers
    fusion = config["fusion"]
    check_choice("config", "fusion", fusion, FUSIONS)
    for name, wanted in _OF_FUSION.items():
        if config[name] is not None and fusion != wanted:
            raise ValueError(
                f"config: {name} is for fusion={wanted!r}; with {fusion!r} it must be None, "
                f"got {config[name]!r}"
            )
    defaults: dict[str, Any] = {"projection_dim": text.hidden_size}
    if fusion == "prepend":
        defaults |= {"num_image_tokens": patches, "image_pooling": "average"}
    if fusion == "cross_attention":
        defaults |= {"cross_attention_every": min(CROSS_ATTENTION_EVERY, layers)}
    config = config | {name: value for name, value in defaults.items() if config[name] is None}
    tokens = config["num_image_tokens"]
    return config | {
        "vision_config": config["vision_config"] | {"vision_use_head": False},
        "text_config": config["text_config"]
        | {"num_image_tokens": patches if tokens is None else tokens},
    }


def _check_joining(config: Config, text: TextSpec, patches: int) -> None:
    owner = "config"
    if text.cross_attention_layers:
        raise ValueError(
            "text_config: cross_attention_layers must be None: cross_attention_every places "
            f"them; got {list(text.cross_attention_layers)}"
        )
    if type(config["ignore_index"]) is not int:
        raise ValueError(f"ignore_index must be an integer, got {config['ignore_index']!r}")
    check_choice(owner, "projector", config["projector"], PROJECTORS)
    check_size(owner, "projection_dim", config["projection_dim"])
    if config["projector"] == "linear" and config["projection_dim"] != text.hidden_size:
        raise ValueError(
            f"config: projection_dim must be the decoder's hidden_size {text.hidden_size} or None "
            f"with projector='linear', which is one layer; got {config['projection_dim']}"
        )
    check_choice(owner, "vision_feature", config["vision_feature"], VISION_FEATURES)
    check_choice(owner, "projector_hidden_act", config["projector_hidden_act"], ACTIVATIONS)
    check_flag(owner, "multimodal_projector_bias", config["multimodal_projector_bias"])
    if (tokens := config["num_image_tokens"]) is not None:
        check_size(owner, "num_image_tokens", tokens)
        if tokens > patches:
            raise ValueError(
                f"config: num_image_tokens must be at most the {patches} patches of an image, "
                f"got {tokens}"
            )
        check_choice(owner, "image_pooling", config["image_pooling"], POOLINGS)
    if (every := config["cross_attention_every"]) is not None:
        check_size(owner, "cross_attention_every", every)
        if every > text.num_hidden_layers:
            raise ValueError(
                "config: cross_attention_every must be at most the text model's "
                f"{text.num_hidden_layers} layers, got {every}"
            )


def _read(config: Config) -> ModelSpec:
    vision, text = vision_spec(config["vision_config"]), check_text(config["text_config"])
    _check_joining(config, text, count_patches(vision))
    pre_norm = config["vision_feature"] == "pre_norm"
    return ModelSpec(
        text=_with_cross_layers(text, config["cross_attention_every"]),
        encoder="siglip",
        vision=vision,
        feature_layers=(vision.num_hidden_layers,) if pre_norm else None,
        projector=config["projector"],
        projector_sizes=(vision.hidden_size, config["projection_dim"], text.hidden_size),
        projector_act=config["projector_hidden_act"],
        projector_bias=config["multimodal_projector_bias"],
        fusion=config["fusion"],
        pooling=config["image_pooling"],
        tokens_per_image=config["text_config"]["num_image_tokens"],
        image_token_index=llava.check_image_token(config),
        ignore_index=config["ignore_index"],
    )


def _with_cross_layers(text: TextSpec, every: int | None) -> TextSpec:
    """Add a cross-attention layer after every `every` layers of the decoder."""
    if every is None:
        return text
    layers = []
    for count, layer in enumerate(text.layers, 1):
        layers += [layer] if count % every else [layer, replace(layer, attention="cross")]
    return replace(text, layers=tuple(layers))


def _written_as(config: Config) -> Config:
    """LLaVA's config for a model that Hugging Face's LLaVA can represent: features before the final
    norm, all of them merged; a projector of two layers as wide inside as the decoder; a
    placeholder with a row in the embedding matrix; a Llama decoder.
    """
    text, token = config["text_config"], config["image_token_index"]
    own = {**OWN_TEXT, "num_image_tokens": text["num_image_tokens"]}
    if not (
        config["vision_feature"] == "pre_norm"
        and (config["fusion"], config["projector"]) == ("merge", "mlp")
        and config["projection_dim"] == text["hidden_size"]
        and token is not None
        and token < text["vocab_size"]
        and all(text.get(name) == value for name, value in own.items())
    ):
        return config
    same = ("ignore_index", "image_token_index", "multimodal_projector_bias")
    return {name: config[name] for name in (*same, "projector_hidden_act")} | {
        "model_type": llava.FAMILY.name,
        "vision_config": dict(config["vision_config"]),
        "text_config": {name: value for name, value in text.items() if name not in OWN_TEXT},
        "image_seq_length": text["num_image_tokens"],
        "vision_feature_layer": -1,
        "vision_feature_select_strategy": "full",
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def from_llava(content: Config) -> Config:
    """Our config.json's content from LLaVA's.

    Raises:
        ValueError: the LLaVA is not SigLIP + Llama, or reads other features than its encoder's
            last layer.
    """
    for name, default, taken in (
        ("vision_feature_layer", -2, (-1, [-1])),
        ("vision_feature_select_strategy", "default", ("full",)),
    ):
        value = content.get(name, default)
        if value not in taken:
            raise ValueError(
                f"config.json: {name} = {value!r} is not MllamaConfig's; {taken[0]!r} is"
            )
    for name, default, taken in (
        ("vision_config", "clip_vision_model", "siglip_vision_model"),
        ("text_config", "llama", "llama"),
    ):
        part = content.get(name)
        kind = part.get("model_type", default) if isinstance(part, dict) else default
        if kind != taken:
            raise ValueError(
                f"config.json: a {name} of model_type {kind!r} is not MllamaConfig's; {taken!r} is"
            )
    same = ("vision_config", "text_config", "ignore_index", "multimodal_projector_bias")
    same = (*same, "projector_hidden_act", "tie_word_embeddings")
    token = content.get("image_token_index", content.get("image_token_id", 32000))
    return {name: content[name] for name in same if name in content} | {
        "image_token_index": token,
        "vision_feature": "pre_norm",
    }


FAMILY = Family(
    name="siglip_llama",
    defaults=DEFAULTS,
    parts={"vision_config": (VISION,), "text_config": (TEXT,)},
    translate=_translate,
    settle=_settle,
    read=_read,
    weight_map=lambda spec: WEIGHT_MAP,
    written_as=_written_as,
    write=dict,
    processor="merged",
)
