"""Memory that a model needs, by part, computed from its spec without loading or allocating it.

Weights, caches and logits are exact. Activations are the widest moment of one layer, where a
forward pass in inference mode peaks: within about a quarter of the measured value. Memory that
libraries and allocators reserve comes on top.
"""

from collections.abc import Container
from dataclasses import dataclass

import torch
from torch import nn

from mllama.config.spec import ModelSpec, count_patches
from mllama.encoders import ENCODERS
from mllama.nn.packed import PackedEmbedding, PackedLinear

PARTS = ("vision encoder", "projector", "embeddings", "decoder", "cross layers", "head")
# Tensors of a layer's width alive in its feed-forward block: input, attention output, sum, norm.
_STATES = 4
_FLOAT32 = 4
_PARTS_NAMED = {
    "vision_tower": "vision encoder",
    "head": "vision encoder",
    "image_pooling": "projector",
    "multi_modal_projector": "projector",
    "lm_head": "head",
}


@dataclass(frozen=True)
class Work:
    """The size of one forward pass.

    Attributes:
        context: tokens per row: prompt and answer, placeholders or visual tokens included.
        batch: number of rows.
        tiles: non-empty tiles of a row's images, or images of an encoder without tiles. The encoder
            computes all `max_num_tiles` of an image; keys are those of the non-empty tiles (with
            reference="hf" of all).
        dtype: dtype of weights and activations.
    """

    context: int
    batch: int
    tiles: int
    dtype: torch.dtype


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part, in the order of `PARTS`; parts that the model lacks are absent. A tied
    head is counted with the embeddings.

    Args:
        model: a model of this package; it may be on the meta device.
    """
    tied = model.get_expanded_tied_weights_keys()
    crossed = _crossed(model.spec)
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in tied:
            found[_part(name, crossed)] += parameter.numel()
    for name, layer in _packed_layers(model, tied):
        bias = getattr(layer, "bias", None)
        count = layer.format.rows * layer.format.columns
        found[_part(name, crossed)] += count + (0 if bias is None else bias.numel())
    return {part: count for part, count in found.items() if count}


def memory_needed(model: nn.Module, work: Work) -> dict[str, int]:
    """Bytes by purpose, at the peak of a forward pass over the whole context in inference mode.

    Args:
        model: a model of this package; it may be on the meta device.
        work: the size of the pass.

    Returns:
        "weights"; "vision activations" if there is an encoder; "cross-attention keys and values"
        if there are such layers; "key-value cache", "decoder activations" and "logits" if there is
        a decoder. Logits are those of the last position, with `generate`'s float32 copy.
    """
    spec, size = model.spec, work.dtype.itemsize
    packed = [layer for _, layer in _packed_layers(model, model.get_expanded_tied_weights_keys())]
    dense = sum(count_parameters(model).values())
    dense -= sum(layer.format.rows * layer.format.columns for layer in packed)
    needed = {"weights": dense * size + sum(layer.format.nbytes for layer in packed)}
    if spec.encoder is not None:
        needed["vision activations"] = _vision(spec, work)
    if (text := spec.text) is None:
        return needed
    crossed = len(_crossed(spec))
    per_key = 2 * text.num_key_value_heads * text.head_dim * size
    tokens = work.batch * work.context
    if crossed:
        needed["cross-attention keys and values"] = (
            crossed * work.batch * image_tokens(spec, work.tiles) * per_key
        )
    return needed | {
        "key-value cache": (text.num_hidden_layers - crossed) * tokens * per_key,
        "decoder activations": tokens
        * (_STATES * text.hidden_size + 3 * text.intermediate_size)
        * size,
        "logits": work.batch * text.vocab_size * (size + _FLOAT32),
    }


def _packed_layers(
    model: nn.Module, tied: Container[str]
) -> list[tuple[str, PackedLinear | PackedEmbedding]]:
    """Layers with packed weights and their names, without a tied head."""
    return [
        (name, layer)
        for name, layer in model.named_modules()
        if isinstance(layer, (PackedLinear, PackedEmbedding)) and f"{name}.weight" not in tied
    ]


def image_tokens(spec: ModelSpec, tiles: int) -> int:
    """Features of one row's non-empty tiles, as the decoder reads them."""
    return tiles * spec.tokens_per_image if spec.pooling else _encoder_tokens(spec, tiles)


def _encoder_tokens(spec: ModelSpec, tiles: int) -> int:
    """Tokens of one row's images in the encoder, class tokens included."""
    patches = count_patches(spec.vision)
    return tiles * (patches + ENCODERS[spec.encoder].class_tokens)


def _vision(spec: ModelSpec, work: Work) -> int:
    vision, encoder = spec.vision, ENCODERS[spec.encoder]
    states = _STATES + encoder.peak_states(spec)
    per_token = states * vision.hidden_size + 2 * vision.intermediate_size
    tokens = _encoder_tokens(spec, encoder.count_encoded(vision, work.tiles))
    return work.batch * tokens * per_token * work.dtype.itemsize


def _crossed(spec: ModelSpec) -> frozenset[int]:
    return frozenset(() if spec.text is None else spec.text.cross_attention_layers or ())


def part_of(model: nn.Module, name: str) -> str:
    """Which of PARTS a tensor of a model belongs to, by its name."""
    return _part(name, _crossed(model.spec))


def _part(name: str, crossed: frozenset[int]) -> str:
    first, second, *rest = name.split(".")
    if first == "language_model":
        if second == "embed_tokens":
            return "embeddings"
        return "cross layers" if second == "layers" and int(rest[0]) in crossed else "decoder"
    return _PARTS_NAMED[first]
