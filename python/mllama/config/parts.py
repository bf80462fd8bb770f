"""Checked specs of decoders and encoders, from their part of config.json."""

from collections.abc import Collection, Mapping
from dataclasses import fields
from typing import Any

from mllama.config.checks import (
    ACTIVATIONS,
    LAYERS_MAX,
    SIZE_MAX,
    TEXT_ACTIVATIONS,
    TILES_MAX,
    check_choice,
    check_flag,
    check_head_dim,
    check_head_size,
    check_kind,
    check_multiple,
    check_number,
    check_size,
)
from mllama.config.spec import TextSpec, TiledVisionSpec, VisionSpec, uniform_layers

_TEXT_SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "max_position_embeddings"),
)
_VISION_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_channels", "image_size", "patch_size"),
)
_TILED_SIZES = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_global_layers"),
    *("attention_heads", "num_channels", "image_size", "patch_size", "max_num_tiles"),
    "vision_output_dim",
)
_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
# Fields of transformers' decoders whose computation is not supported, with the value that turns it
# off.
_NOT_COMPUTED = {"attention_dropout": 0, "dropout": 0, "attention_chunk_size": None}
# The same for decoders whose layers are all alike.
_NOT_UNIFORM = {
    "sliding_window": None,
    "final_logit_softcapping": None,
    "attn_logit_softcapping": None,
}


def text_spec(
    config: Mapping[str, Any],
    read: Collection[str],
    owner: str = "text_config",
    cross: Collection[int] = (),
    **own: Any,
) -> TextSpec:
    """The spec of a decoder with equal layers, apart from the cross-attention layers.

    Args:
        config: the decoder's config, after `settle_rope`.
        read: names of fields that the family reads; other fields are ignored.
        owner: name used in errors.
        cross: indices of cross-attention layers.
        own: fields of the spec that the family sets.

    Raises:
        ValueError: invalid sizes or choices; the message names the field.
    """
    given = text_fields(config, read, owner)
    check_values(config, _NOT_UNIFORM, owner)
    check_kind(owner, "layer_types", kinds := config.get("layer_types") or [], list)
    for kind in kinds:
        check_choice(owner, "layer_types", kind, ("full_attention",))
    layers = uniform_layers(config["num_hidden_layers"], config["rope_parameters"], cross)
    return TextSpec(**given | {"layers": layers} | own)


def text_fields(config: Mapping[str, Any], read: Collection[str], owner: str) -> dict[str, Any]:
    """The checked fields of a decoder's spec, except its layers. Arguments as `text_spec`.

    Raises:
        ValueError: invalid sizes or choices; the message names the field.
    """
    for name in _TEXT_SIZES:
        check_size(owner, name, config[name])
    if (layers := config["num_hidden_layers"]) > LAYERS_MAX:
        raise ValueError(f"{owner}: num_hidden_layers must be at most {LAYERS_MAX}, got {layers}")
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads")
    kv_heads = heads if kv_heads is None else kv_heads
    check_size(owner, "num_key_value_heads", kv_heads)
    if heads % kv_heads:
        raise ValueError(
            f"{owner}: num_attention_heads {heads} is not a multiple of num_key_value_heads "
            f"{kv_heads}"
        )
    check_multiple(owner, config["hidden_size"], heads, "num_attention_heads")
    head_dim = config.get("head_dim")
    head_dim = config["hidden_size"] // heads if head_dim is None else head_dim
    check_head_size(owner, "head_dim", head_dim)
    if head_dim % 2:
        raise ValueError(f"{owner}: head_dim must be even for rotary positions, got {head_dim}")
    _check_text_choices(config, owner)
    names = {field.name for field in fields(TextSpec)} & {*read} - {"final_logit_softcapping"}
    given = {name: config[name] for name in names if config.get(name) is not None}
    return given | {"head_dim": head_dim, "num_key_value_heads": kv_heads}


def _check_text_choices(config: Mapping[str, Any], owner: str) -> None:
    check_number(owner, "rms_norm_eps", config["rms_norm_eps"])
    check_choice(owner, "hidden_act", config["hidden_act"], TEXT_ACTIVATIONS)
    for name in ("attention_bias", "mlp_bias", "tie_word_embeddings"):
        check_flag(owner, name, config.get(name) or False)
    check_values(config, _NOT_COMPUTED, owner)
    # None is False to transformers.
    check_choice(owner, "is_causal", config.get("is_causal", True), (True,))
    for name in _IDS:
        value = config.get(name)
        for token in value if isinstance(value, list) else [value]:
            if token is not None and (
                isinstance(token, bool) or not isinstance(token, int) or abs(token) > SIZE_MAX
            ):
                raise ValueError(f"{owner}: {name} must be an id, a list or None, got {value!r}")


def check_values(config: Mapping[str, Any], values: Mapping[str, Any], owner: str) -> None:
    """Raise ValueError for a field that is neither None nor the value given for it."""
    for name, value in values.items():
        check_choice(owner, name, config.get(name), dict.fromkeys((value, None)))


def check_cross_layers(config: Mapping[str, Any], owner: str = "text_config") -> tuple[int, ...]:
    """The checked `cross_attention_layers` of a decoder's config.

    Raises:
        ValueError: not a layer, or layer 0, whose cache tells the number of cached tokens.
    """
    layers, count = config.get("cross_attention_layers") or [], config["num_hidden_layers"]
    if not isinstance(layers, (list, tuple)) or any(
        isinstance(layer, bool) or not isinstance(layer, int) or not 0 < layer < count
        for layer in layers
    ):
        raise ValueError(
            f"{owner}: cross_attention_layers must be layers of 1 to {count - 1}, got {layers!r}"
        )
    return tuple(layers)


def vision_spec(config: Mapping[str, Any], owner: str = "vision_config") -> VisionSpec:
    """The spec of a SigLIP or CLIP encoder.

    Raises:
        ValueError: invalid sizes or choices; the message names the field.
    """
    for name in _VISION_SIZES:
        check_size(owner, name, config[name])
    check_head_dim(
        owner, config["hidden_size"], config["num_attention_heads"], "num_attention_heads"
    )
    check_number(owner, "layer_norm_eps", config["layer_norm_eps"])
    check_choice(owner, "hidden_act", config["hidden_act"], ACTIVATIONS)
    check_flag(owner, "vision_use_head", config.get("vision_use_head", False))
    dropout = config["attention_dropout"]
    if isinstance(dropout, bool) or not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise ValueError(
            f"{owner}: attention_dropout must be a number from 0 to below 1, got {dropout!r}"
        )
    image_size, patch_size = config["image_size"], config["patch_size"]
    if patch_size > image_size:
        raise ValueError(f"{owner}: patch_size {patch_size} is larger than image_size {image_size}")
    check_size(owner, "patches of an image_size", (image_size // patch_size) ** 2)
    return VisionSpec.of(config)


def tiled_spec(config: Mapping[str, Any], owner: str = "vision_config") -> TiledVisionSpec:
    """The spec of Llama-3.2-Vision's encoder.

    Raises:
        ValueError: invalid sizes or choices; the message names the field.
    """
    for name in _TILED_SIZES:
        check_size(owner, name, config[name])
    check_number(owner, "norm_eps", config["norm_eps"])
    check_choice(owner, "hidden_act", config["hidden_act"], ACTIVATIONS)
    hidden_size, tiles = config["hidden_size"], config["max_num_tiles"]
    check_head_dim(owner, hidden_size, config["attention_heads"], "attention_heads")
    if config["image_size"] % config["patch_size"]:
        raise ValueError(
            f"{owner}: image_size {config['image_size']} is not a multiple of patch_size "
            f"{config['patch_size']}"
        )
    if tiles > TILES_MAX:
        raise ValueError(f"{owner}: max_num_tiles must be at most {TILES_MAX}, got {tiles}")
    layers = config["intermediate_layers_indices"]
    if not _are_rising(layers, config["num_hidden_layers"]):
        raise ValueError(
            f"{owner}: intermediate_layers_indices must increase within 0 to "
            f"{config['num_hidden_layers'] - 1}, got {layers!r}"
        )
    wanted = hidden_size * (len(layers) + 1)
    if config["vision_output_dim"] != wanted:
        raise ValueError(
            f"{owner}: vision_output_dim must be hidden_size x (intermediate layers + 1) = "
            f"{wanted}, got {config['vision_output_dim']}"
        )
    ratios = config["supported_aspect_ratios"]
    if not _are_ratios(ratios, tiles):
        raise ValueError(
            f"{owner}: supported_aspect_ratios must be pairs of at most {tiles} tiles, "
            f"got {ratios!r}"
        )
    return TiledVisionSpec.of(config)


def _are_rising(layers: Any, count: int) -> bool:
    return (
        isinstance(layers, (list, tuple))
        and all(type(layer) is int and 0 <= layer < count for layer in layers)
        and sorted(set(layers)) == list(layers)
    )


def _are_ratios(ratios: Any, tiles: int) -> bool:
    return (
        isinstance(ratios, (list, tuple))
        and bool(ratios)
        and all(
            isinstance(ratio, (list, tuple))
            and len(ratio) == 2
            and all(type(side) is int and side >= 1 for side in ratio)
            and ratio[0] * ratio[1] <= tiles
            for ratio in ratios
        )
    )


def select_features(
    layer: int | list[int] | tuple[int, ...], strategy: str, states: int
) -> tuple[tuple[int, ...], bool]:
    """The encoder's states that a LLaVA reads, and whether the first feature is left out.

    Args:
        layer: `vision_feature_layer`: one or several; negative ones count from the end.
        strategy: `vision_feature_select_strategy`: "default" leaves out the first feature, "full"
            keeps it.
        states: number of states: the embeddings and every layer's output.

    Raises:
        ValueError: a layer does not exist, or the strategy is unknown.
    """
    layers = list(layer) if isinstance(layer, (list, tuple)) else [layer]
    if not layers or any(
        isinstance(one, bool) or not isinstance(one, int) or not -states <= one < states
        for one in layers
    ):
        raise ValueError(
            f"vision_feature_layer must name states of -{states} to {states - 1}, got {layer!r}"
        )
    check_choice("model", "vision_feature_select_strategy", strategy, ("default", "full"))
    return tuple(one % states for one in layers), strategy == "default"
