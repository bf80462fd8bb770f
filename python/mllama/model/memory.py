"""What memory a model needs, by part, from its composition and sizes alone: nothing is loaded and
nothing allocated.

Weights, caches and logits are counted to the byte. Activations are what the widest moment of one
layer holds, which is where a forward
pass in inference mode peaks: within a quarter or so of what is measured. What libraries and
allocators keep for themselves comes on top.
"""

from dataclasses import dataclass

import torch
from torch import nn

from mllama.config.spec import ModelSpec
from mllama.encoders import ENCODERS

PARTS = ("tower", "projector", "embeddings", "decoder", "cross layers", "head")
# of a layer's width, alive while its feed-forward block runs: the layer's input, attended, their
# sum, its norm
_STATES = 4
_FLOAT32 = 4
_PARTS_NAMED = {
    "vision_tower": "tower",
    "head": "tower",
    "image_pooling": "projector",
    "multi_modal_projector": "projector",
    "lm_head": "head",
}


@dataclass(frozen=True)
class Work:
    """What is asked of a model at once.

    Attributes:
        context: tokens of a row, prompt and answer, placeholders or visual tokens included.
        batch: rows.
        tiles: of the images of a row that are filled; of an encoder that cuts no tiles, its
            images. The encoder holds an image's `max_num_tiles` however few are filled; keys have
            the filled ones (with reference="hf" all).
        dtype: of weights and activations.
    """

    context: int
    batch: int
    tiles: int
    dtype: torch.dtype


def count_parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part, in the order of `PARTS`, without the parts that the model lacks. A tied
    head is no part of its own.

    Args:
        model: of this package; it may be on the meta device.
    """
    tied = model.get_expanded_tied_weights_keys()
    crossed = _crossed(spec_of(model))
    found = dict.fromkeys(PARTS, 0)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if name not in tied:
            found[_part(name, crossed)] += parameter.numel()
    return {part: count for part, count in found.items() if count}


def memory_needed(model: nn.Module, work: Work) -> dict[str, int]:
    """Bytes by what they are for, at the peak of a forward pass over the whole context in inference
    mode.

    Args:
        model: of this package; it may be on the meta device.
        work: what is asked of it.

    Returns:
        "weights"; of a model with an encoder "vision activations"; of one with cross-attention
        "cross-attention keys and values"; of one with a decoder "key-value cache", "decoder
        activations" and "logits": of the last position, with the float32 copy from which `generate`
            chooses.
    """
    spec, size = spec_of(model), work.dtype.itemsize
    needed = {"weights": sum(count_parameters(model).values()) * size}
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


def spec_of(model: nn.Module) -> ModelSpec:
    """What a model of this package is made of; an encoder alone has no text."""
    return (
        model.spec
        if hasattr(model, "spec")
        else ModelSpec(text=None, encoder="siglip", vision=model.vision_tower.config)
    )


def image_tokens(spec: ModelSpec, tiles: int) -> int:
    """Features of the filled tiles of one row, as the decoder has them."""
    return tiles * spec.tokens_per_image if spec.pooling else _encoder_tokens(spec, tiles)


def _encoder_tokens(spec: ModelSpec, tiles: int) -> int:
    """The same as the encoder has them, class tokens among them."""
    patches = (spec.vision.image_size // spec.vision.patch_size) ** 2
    return tiles * (patches + ENCODERS[spec.encoder].class_tokens)


def _vision(spec: ModelSpec, work: Work) -> int:
    vision, encoder = spec.vision, ENCODERS[spec.encoder]
    states = _STATES + encoder.peak_states(spec)
    per_token = states * vision.hidden_size + 2 * vision.intermediate_size
    tokens = _encoder_tokens(spec, encoder.count_encoded(vision, work.tiles))
    return work.batch * tokens * per_token * work.dtype.itemsize


def _crossed(spec: ModelSpec) -> frozenset[int]:
    return frozenset(() if spec.text is None else spec.text.cross_attention_layers or ())


def _part(name: str, crossed: frozenset[int]) -> str:
    first, second, *rest = name.split(".")
    if first == "language_model":
        if second == "embed_tokens":
            return "embeddings"
        return "cross layers" if second == "layers" and int(rest[0]) in crossed else "decoder"
    return _PARTS_NAMED[first]
