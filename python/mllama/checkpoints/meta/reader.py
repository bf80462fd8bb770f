"""Reads Meta's own folders of Llama 3.x and Llama-3.2-Vision: params.json, consolidated.*.pth, and
the tensor names of Meta's reference code.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllama.checkpoints.files import find_inside, read_json
from mllama.checkpoints.meta.source import MetaSource, find_shards
from mllama.checkpoints.meta.weight_maps import ENCODER, text_weight_map, vision_weight_map
from mllama.checkpoints.opened import Opened
from mllama.checkpoints.sources import Header
from mllama.config.checks import SIZE_MAX
from mllama.families.mllama import EXTRA_EMBEDDINGS
from mllama.weights.family import Config

PARAMS = "params.json"
# Sizes of the vision encoder that params.json does not have: constants of Meta's code.
VISION = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_global_layers": 8,
    "attention_heads": 16,
    "patch_size": 14,
    "num_channels": 3,
    "intermediate_layers_indices": [3, 7, 15, 23, 30],
}
_SPECIAL = 256  # special tokens, the last of the vocabulary
_ROPE_FACTOR_32 = (
    (2048, 16),
    (3072, 28),
)  # (dim, n_layers) of 1B and 3B; the others have 8, Meta's default
_FINER = 4  # positions are interpolated to at most this many times the file's


def open_meta(folder: str | Path) -> Opened:
    """Open a folder as Meta ships it: its config, and its tensors with Meta's names, merged from
    parallel shards.

    Args:
        folder: a folder with params.json and consolidated.pth, or consolidated.00.pth,
            consolidated.01.pth and so on.

    Raises:
        FileNotFoundError: params.json, the weights or a shard is missing.
        ValueError: params.json or a shard is broken or not a Llama 3's, or they do not fit each
            other.
    """
    folder = Path(folder)
    params = _Params(find_inside(folder, PARAMS))
    source = MetaSource(str(folder), find_shards(folder))
    text = _text_arguments(params)
    return (
        _open_vision(params, text, source)
        if params.has_vision
        else _open_text(params, text, source)
    )


def _open_text(params: "_Params", text: dict[str, Any], source: "MetaSource") -> Opened:
    headers = source.headers()
    _check_fit(params.path, headers, _text_shapes("", text), {"layers": text["num_hidden_layers"]})
    tied = "output.weight" not in headers or source.same("output.weight", "tok_embeddings.weight")
    config = text | {"model_type": "llama", "tie_word_embeddings": tied}
    return Opened.of(config, source, text_weight_map, _generation(text))


def _open_vision(params: "_Params", text: dict[str, Any], source: "MetaSource") -> Opened:
    layers, tiles = text["num_hidden_layers"], params.count("vision_max_num_chunks", 4)
    headers = source.headers()
    width, dim = VISION["hidden_size"], text["hidden_size"]
    states = 1 + len(VISION["intermediate_layers_indices"])
    fusion = _fusion(layers, params.count("vision_num_cross_attention_layers"))
    _check_fit(
        params.path,
        headers,
        _text_shapes("text_model.", text)
        | {
            "text_model.learnable_embedding.weight": (EXTRA_EMBEDDINGS, dim),
            f"{ENCODER}conv1._linear.weight": (
                width,
                VISION["num_channels"] * VISION["patch_size"] ** 2,
            ),
            f"{ENCODER}positional_embedding": (None, width),
            f"{ENCODER}gated_positional_embedding": (tiles, tiles, None, width),
            f"{ENCODER}transformer.resblocks.0.mlp.c_fc.weight": (
                VISION["intermediate_size"],
                width,
            ),
            "vision_model.vision_projection.weight": (dim, states * width),
        },
        {
            "text_model.layers": layers,
            "text_model.cross_attention_layers": len(fusion),
            f"{ENCODER}transformer.resblocks": VISION["num_hidden_layers"],
            f"{ENCODER}global_transformer.resblocks": VISION["num_global_layers"],
        },
    )
    size = params.count("vision_chunk_size")
    patches, positions = (
        (size // VISION["patch_size"]) ** 2,
        headers[f"{ENCODER}positional_embedding"].shape[0] - 1,
    )
    if not 0 < patches <= _FINER * positions:
        raise ValueError(
            f"{params.path}: vision_chunk_size {size} makes {patches} patches; the shards have "
            f"positions for {positions}"
        )
    crossed = [layer + place for place, layer in enumerate(sorted(fusion))]
    config = {
        "model_type": "mllama",
        "text_config": text
        | {"num_hidden_layers": layers + len(crossed), "cross_attention_layers": crossed},
        "vision_config": VISION
        | {
            "image_size": size,
            "vision_output_dim": states * width,
            "max_num_tiles": tiles,
            "supported_aspect_ratios": [
                [h, w] for h in range(1, tiles + 1) for w in range(1, tiles + 1) if h * w <= tiles
            ],
        },
        "image_token_index": text["vocab_size"],  # the first of the new rows
    }
    return Opened.of(config, source, vision_weight_map, _generation(text))


def _fusion(self_layers: int, cross_layers: int) -> range:
    """Meta's schedule, from the last layer on: the self-attention layers that follow a
    cross-attention layer, evenly spread.
    """
    return range(self_layers - 1, -1, -math.ceil(self_layers / cross_layers))[:cross_layers]


def _text_arguments(params: "_Params") -> dict[str, Any]:
    """The config of the decoder, without cross-attention layers."""
    dim, layers, heads = (params.count(name) for name in ("dim", "n_layers", "n_heads"))
    kv_heads, vocabulary = params.count("n_kv_heads", heads), params.count("vocab_size")
    if dim % (2 * heads) or heads % kv_heads:
        raise ValueError(
            f"{params.path}: dim {dim}, n_heads {heads} and n_kv_heads {kv_heads} do not divide "
            "one another"
        )
    rope = {"rope_type": "default", "rope_theta": params.number("rope_theta")}
    scaled = params.content.get("use_scaled_rope", False)
    if not isinstance(scaled, bool):
        raise ValueError(f"{params.path}: use_scaled_rope must be true or false, got {scaled!r}")
    if scaled:
        rope |= {
            "rope_type": "llama3",
            "factor": 32.0 if (dim, layers) in _ROPE_FACTOR_32 else 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        }
    inner = int(2 * 4 * dim / 3)
    if params.content.get("ffn_dim_multiplier") is not None:
        inner = int(params.number("ffn_dim_multiplier") * inner)
    multiple = params.count("multiple_of", 256)
    return {
        "vocab_size": vocabulary,
        "hidden_size": dim,
        "intermediate_size": math.ceil(inner / multiple) * multiple,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "rms_norm_eps": params.number("norm_eps"),
        "rope_parameters": rope,
        "max_position_embeddings": 131072 if scaled else 8192,
        **_special_ids(vocabulary),
    }


def _special_ids(vocabulary: int) -> dict[str, Any]:
    """Config fields of Meta's special tokens; empty if the vocabulary is too small for them."""
    if vocabulary < 256 + _SPECIAL:
        return {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    first = vocabulary - _SPECIAL
    # Meta stops at end of text, end of message and end of turn for every model.
    return {
        "bos_token_id": first,
        "eos_token_id": [first + 1, first + 8, first + 9],
        "pad_token_id": first + 4,
    }


def _generation(text: Config) -> dict[str, Any] | None:
    ids = {name: text[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    return ids if ids["eos_token_id"] is not None else None


def _text_shapes(prefix: str, text: dict[str, Any]) -> dict[str, tuple[int | None, ...]]:
    """Tensors whose shapes show every size of the decoder."""
    dim, vocabulary = text["hidden_size"], text["vocab_size"]
    kv_dim = dim // text["num_attention_heads"] * text["num_key_value_heads"]
    return {
        f"{prefix}tok_embeddings.weight": (vocabulary, dim),
        f"{prefix}layers.0.attention.wq.weight": (dim, dim),
        f"{prefix}layers.0.attention.wk.weight": (kv_dim, dim),
        f"{prefix}layers.0.feed_forward.w1.weight": (text["intermediate_size"], dim),
    }


def _check_fit(
    path: Path,
    headers: Mapping[str, Header],
    shapes: dict[str, tuple[int | None, ...]],
    counts: dict[str, int],
) -> None:
    """Check that the shards have the sizes in params.json, before anything is built.

    Args:
        shapes: {tensor: its shape}, None for any size.
        counts: {name of a list of layers: its length}.
    """
    wrong = []
    for name, shape in shapes.items():
        found = headers[name].shape if name in headers else None
        if found is None:
            wrong.append(f"there is no {name}")
        elif len(found) != len(shape) or any(
            size not in (None, given) for size, given in zip(shape, found, strict=True)
        ):
            wrong.append(f"{name} is {list(found)}, not {str(list(shape)).replace('None', 'any')}")
    for stem, count in counts.items():
        numbers = {
            name[len(stem) + 1 :].split(".")[0] for name in headers if name.startswith(f"{stem}.")
        }
        if len(numbers) != count:
            wrong.append(f"there are {len(numbers)} {stem}, not {count}")
    if wrong:
        raise ValueError(f"{path} and its shards do not fit each other: {'; '.join(wrong)}")


class _Params:
    """The content of params.json; numbers are checked when read."""

    def __init__(self, path: Path):
        self.path = path
        content = read_json(path)
        inner = content.get("model", content)
        if not isinstance(inner, dict):
            raise ValueError(f"{path}: model must be an object, got {inner!r}")
        self.content = inner

    @property
    def has_vision(self) -> bool:
        """Whether it is a Llama-3.2-Vision, by the test in Meta's code."""
        return self.content.get("vision_chunk_size", -1) != -1

    def count(self, name: str, default: int | None = None) -> int:
        """An integer of at least 1. Raises ValueError for anything else, or if it is missing and
        there is no default.
        """
        value = self._get(name, default)
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= SIZE_MAX:
            raise ValueError(
                f"{self.path}: {name} must be a whole number from 1 to {SIZE_MAX}, got "
                f"{str(value)[:40]!r}"
            )
        return value

    def number(self, name: str) -> float:
        """A number above 0. Raises ValueError for anything else, or if it is missing."""
        value = self._get(name, None)
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not 0 < value <= SIZE_MAX
        ):
            raise ValueError(
                f"{self.path}: {name} must be a number above 0 and at most {SIZE_MAX}, got "
                f"{str(value)[:40]!r}"
            )
        return float(value)

    def _get(self, name: str, default: int | None) -> Any:
        value = self.content.get(name)
        value = default if value is None else value
        if value is None:
            raise ValueError(f"{self.path} has no {name}; it is not of a Llama 3")
        return value
