"""What a model is made of, by family: a config of any kind -> its `ModelSpec`. The config's
`model_type` decides, exactly.

`model.config` stays the family's own Hugging Face object, since PEFT, `generate` and Trainer read
it; what is built is read from here alone, with every size checked.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from transformers import PretrainedConfig

from mllama.config.checks import HEAD_DIM_MAX, HEAD_DIM_MIN, check_choice, check_number, check_size
from mllama.config.spec import ModelSpec, TextSpec, TiledVisionSpec, VisionSpec
from mllama.hf.configs import MllamaConfig, MllamaTextConfig, MllamaVisionConfig
from mllama.nn.activation import ACTIVATIONS

_TEXT_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_bias",
    "attention_dropout",
    "mlp_bias",
)
_VISION_FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_channels",
    "image_size",
    "patch_size",
    "hidden_act",
    "layer_norm_eps",
    "attention_dropout",
)
# What is read when a model is called, and what says nothing about it.
_LIVE_FIELDS = {
    "use_cache",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "max_position_embeddings",
    "initializer_range",
}
_OWN_TEXT_FIELDS = (
    "norm_offset",
    "embedding_scale",
    "extra_embeddings",
    "cross_attention_layers",
    "num_image_tokens",
    "dropout",
)
_TILED_FIELDS = (
    "num_global_layers",
    "attention_heads",
    "norm_eps",
    "max_num_tiles",
    "vision_output_dim",
    "intermediate_layers_indices",
)
_JOINING_FIELDS = (
    "projector",
    "projection_dim",
    "projector_hidden_act",
    "multimodal_projector_bias",
    "vision_feature",
    "fusion",
)
BUILT_FROM = frozenset(
    {*_TEXT_FIELDS, *_VISION_FIELDS, *_OWN_TEXT_FIELDS, *_TILED_FIELDS, *_JOINING_FIELDS}
    | {
        "supported_aspect_ratios",
        "vision_use_head",
        "image_pooling",
        "cross_attention_every",
        "use_bidirectional_attention",
    }
) - (_LIVE_FIELDS | {"tie_word_embeddings"})
"""Fields of configs and their parts that a model is built from: set afterwards they change nothing
in it.
"""
# Fields of a decoder by which stock models compute something else, and the value by which they do
# not.
_NOT_COMPUTED = {
    "is_causal": True,
    "dropout": 0,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}
TILES_MAX = 64  # of a picture; released models have 4


def compose(config: PretrainedConfig) -> ModelSpec:
    """What a model of this config is made of.

    Raises:
        TypeError: no config.
        ValueError: a `model_type` that is no family of ours; sizes and choices that cannot be. The
            text names the field.
    """
    if not isinstance(config, PretrainedConfig):
        raise TypeError(
            f"config must be a config object of transformers or mllama, got {type(config).__name__}"
        )
    check_choice("config", "model_type", config.model_type, tuple(FAMILIES))
    spec = FAMILIES[config.model_type](config)
    if spec.encoder is not None and config.image_token_index is not None:
        check_size("config", "image_token_index", config.image_token_index, minimum=0)
    return spec


def siglip_vision(config: PretrainedConfig) -> MllamaVisionConfig:
    """The checked config of a SigLIP or CLIP tower."""
    if isinstance(config, MllamaVisionConfig):
        return config
    return MllamaVisionConfig(**_fields(config, _VISION_FIELDS))


def _fields(config: PretrainedConfig, names: tuple[str, ...], **replaced: Any) -> dict[str, Any]:
    return {
        name: getattr(config, name) for name in names if getattr(config, name, None) is not None
    } | replaced


def _text(config: PretrainedConfig, kind: str, **replaced: Any) -> MllamaTextConfig:
    if isinstance(config, MllamaTextConfig):
        return config
    if config.model_type != kind:
        raise ValueError(
            f"text_config: a decoder of model_type {config.model_type!r} is not supported here; {kind!r} is"
        )
    for name in (
        "sliding_window",
        "attention_chunk_size",
    ):  # transformers' caches would forget what lies outside
        if getattr(config, name, None) is not None:
            raise ValueError(
                f"text_config: {name} must be None: layers see all tokens before them; got {getattr(config, name)!r}"
            )
    for kind in getattr(config, "layer_types", None) or ():
        check_choice("text_config", "layer_types", kind, ("full_attention",))
    for name, value in _NOT_COMPUTED.items():
        check_choice("text_config", name, getattr(config, name, None), (value, None))
    own = tuple(
        name
        for name in _TEXT_FIELDS
        if hasattr(type(config), name) or name in type(config).__dataclass_fields__
    )
    return MllamaTextConfig(**_fields(config, own, **replaced))


def _llama(config: PretrainedConfig) -> ModelSpec:
    return ModelSpec(text=TextSpec.of(_text(config, "llama")))


def _gemma_text(config: PretrainedConfig) -> MllamaTextConfig:
    # Gemma's scale is its root of the width; attention, norms and activation are said by these
    # three.
    return _text(config, "gemma", norm_offset=1.0, embedding_scale=float(config.hidden_size) ** 0.5)


def _gemma(config: PretrainedConfig) -> ModelSpec:
    if config.use_bidirectional_attention:
        raise ValueError(
            "use_bidirectional_attention: a Gemma that attends both ways generates no text and is not supported"
        )
    return ModelSpec(text=TextSpec.of(_gemma_text(config)))


def _own(config: MllamaConfig) -> ModelSpec:
    vision, text = config.vision_config, config.text_config
    if text.cross_attention_layers:
        given = text.cross_attention_layers
        raise ValueError(
            f"text_config: cross_attention_layers must be None here: cross_attention_every places them; got {given!r}"
        )
    return ModelSpec(
        text=_crossed(TextSpec.of(text), config.cross_attention_every),
        encoder="siglip",
        vision=VisionSpec.of(vision),
        feature_layers=(vision.num_hidden_layers,) if config.vision_feature == "pre_norm" else None,
        projector=config.projector,
        projector_sizes=(vision.hidden_size, config.projection_dim, text.hidden_size),
        projector_act=config.projector_hidden_act,
        projector_bias=config.multimodal_projector_bias,
        fusion=config.fusion,
        pooling=config.image_pooling,
        tokens_per_image=text.num_image_tokens,
        ignore_index=config.ignore_index,
    )


def _crossed(text: TextSpec, every: int | None) -> TextSpec:
    """A decoder with a cross-attention layer added after every so many of its own."""
    if every is None:
        return text
    added = text.num_hidden_layers // every
    return replace(
        text,
        num_hidden_layers=text.num_hidden_layers + added,
        cross_attention_layers=tuple(number * (every + 1) + every for number in range(added)),
    )


def _llava(config: PretrainedConfig) -> ModelSpec:
    towers = {"siglip_vision_model": "siglip", "clip_vision_model": "clip"}
    kind = config.vision_config.model_type
    check_choice("vision_config", "model_type", kind, tuple(towers))
    if kind == "clip_vision_model":  # transformers' sees causally where one of these says so
        for owner, part in (("config", config), ("vision_config", config.vision_config)):
            check_choice(owner, "is_causal", getattr(part, "is_causal", None), (False, None))
    vision, text = siglip_vision(config.vision_config), _text(config.text_config, "llama")
    layers, skip = select_features(config, vision.num_hidden_layers + 1)
    check_choice("config", "projector_hidden_act", config.projector_hidden_act, tuple(ACTIVATIONS))
    tokens = (vision.image_size // vision.patch_size) ** 2 + (kind == "clip_vision_model") - skip
    if tokens < 1:
        raise ValueError(
            "vision_feature_select_strategy 'default' leaves none of a tower's one feature"
        )
    return ModelSpec(
        text=TextSpec.of(text),
        encoder=towers[kind],
        vision=VisionSpec.of(vision),
        feature_layers=layers,
        skip_first=skip,
        selects_features=True,
        projector="mlp",
        projector_sizes=(vision.hidden_size * len(layers), text.hidden_size, text.hidden_size),
        projector_act=config.projector_hidden_act,
        projector_bias=config.multimodal_projector_bias,
        fusion="merge",
        tokens_per_image=tokens,
    )


def select_features(
    config: PretrainedConfig,
    states: int,
    layer: int | list[int] | None = None,
    strategy: str | None = None,
) -> tuple[tuple[int, ...], bool]:
    """Which of a tower's states a LLaVA reads, and whether without the first feature.

    Args:
        config: says what is not given.
        states: how many there are: the embeddings and every layer's output.
        layer: `vision_feature_layer`.
        strategy: `vision_feature_select_strategy`.

    Raises:
        ValueError: a layer that is none, or another strategy.
    """
    layer = config.vision_feature_layer if layer is None else layer
    layers = list(layer) if isinstance(layer, (list, tuple)) else [layer]
    if not layers or any(
        isinstance(one, bool) or not isinstance(one, int) or not -states <= one < states
        for one in layers
    ):
        raise ValueError(
            f"vision_feature_layer must name states of -{states} to {states - 1}, got {layer!r}"
        )
    strategy = config.vision_feature_select_strategy if strategy is None else strategy
    check_choice("model", "vision_feature_select_strategy", strategy, ("default", "full"))
    return tuple(one % states for one in layers), strategy == "default"


def _paligemma(config: PretrainedConfig) -> ModelSpec:
    check_choice(
        "vision_config", "model_type", config.vision_config.model_type, ("siglip_vision_model",)
    )
    check_choice("text_config", "model_type", config.text_config.model_type, ("gemma",))
    vision, text = siglip_vision(config.vision_config), _gemma_text(config.text_config)
    if config.projection_dim != text.hidden_size:
        raise ValueError(
            f"projection_dim {config.projection_dim!r} must be the decoder's hidden_size {text.hidden_size}"
        )
    return ModelSpec(
        text=TextSpec.of(text),
        encoder="siglip",
        vision=VisionSpec.of(vision),
        projector="linear",
        projector_sizes=(vision.hidden_size, 0, text.hidden_size),
        fusion="merge",
        tokens_per_image=(vision.image_size // vision.patch_size) ** 2,
        bidirectional_prefix=True,
    )


def _mllama(config: PretrainedConfig) -> ModelSpec:
    crossed = {
        "cross_attention_layers": config.text_config.cross_attention_layers,
        "extra_embeddings": 8,
        "tie_word_embeddings": False,
    }
    text = _text(config.text_config, "mllama_text_model", **crossed)
    vision = config.vision_config
    _check_tiled(vision)
    return ModelSpec(
        text=TextSpec.of(text),
        encoder="tiled",
        vision=TiledVisionSpec.of(vision),
        projector="linear",
        projector_sizes=(vision.vision_output_dim, 0, text.hidden_size),
        fusion="cross_attention",
    )


def _check_tiled(vision: PretrainedConfig) -> None:
    owner = "vision_config"
    sizes = (
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_global_layers",
        "attention_heads",
        "num_channels",
    )
    for name in (*sizes, "vision_output_dim", "image_size", "patch_size", "max_num_tiles"):
        check_size(owner, name, getattr(vision, name))
    check_number(owner, "norm_eps", vision.norm_eps)
    check_choice(owner, "hidden_act", vision.hidden_act, tuple(ACTIVATIONS))
    if vision.hidden_size % vision.attention_heads:
        raise ValueError(
            f"{owner}: hidden_size {vision.hidden_size} is not a multiple of attention_heads {vision.attention_heads}"
        )
    head_dim = vision.hidden_size // vision.attention_heads
    if not HEAD_DIM_MIN <= head_dim <= HEAD_DIM_MAX:
        raise ValueError(
            f"{owner}: hidden_size / attention_heads must be {HEAD_DIM_MIN} to {HEAD_DIM_MAX}, got {head_dim}"
        )
    if vision.image_size % vision.patch_size:
        raise ValueError(
            f"{owner}: image_size {vision.image_size} is not a multiple of patch_size {vision.patch_size}"
        )
    if vision.max_num_tiles > TILES_MAX:
        raise ValueError(
            f"{owner}: max_num_tiles must be at most {TILES_MAX}, got {vision.max_num_tiles}"
        )
    layers, ratios = vision.intermediate_layers_indices, vision.supported_aspect_ratios
    if any(not 0 <= layer < vision.num_hidden_layers for layer in layers) or sorted(
        set(layers)
    ) != list(layers):
        raise ValueError(
            f"{owner}: intermediate_layers_indices must rise within 0 to {vision.num_hidden_layers - 1}, got {layers!r}"
        )
    wanted = vision.hidden_size * (len(layers) + 1)
    if vision.vision_output_dim != wanted:
        raise ValueError(
            f"{owner}: vision_output_dim must be hidden_size x (intermediate layers + 1) = {wanted}, got {vision.vision_output_dim}"
        )
    if not ratios or any(
        len(ratio) != 2 or min(ratio) < 1 or ratio[0] * ratio[1] > vision.max_num_tiles
        for ratio in ratios
    ):
        raise ValueError(
            f"{owner}: supported_aspect_ratios must be pairs of at most {vision.max_num_tiles} tiles, got {ratios!r}"
        )


FAMILIES: dict[str, Callable[[Any], ModelSpec]] = {
    MllamaConfig.model_type: _own,
    "llama": _llama,
    "gemma": _gemma,
    "llava": _llava,
    "paligemma": _paligemma,
    "mllama": _mllama,
}
