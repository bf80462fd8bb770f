"""What the decoder asks of a key-value cache of transformers: how much it holds, and how many keys
it will show.

A dynamic cache answers with its number of tokens; a static one shows all of its slots, filled or
not, and keeps its length in a tensor that its update changes in place, so the length is read and
copied before any layer writes. And the place of a layer that attends to pictures, whose keys have
nothing to do with the text's length.
"""

from collections.abc import Sequence

import torch
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer


def check_cache(cache: Cache | None) -> None:
    """Raise TypeError unless it is None or a decoder's cache of transformers, ValueError where it
    forgets tokens (a sliding window's).
    """
    if cache is None:
        return
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            f"cache must be a transformers Cache of a decoder or None, got {type(cache).__name__}"
        )
    for index, layer in enumerate(cache.layers):
        if layer.is_sliding:
            raise ValueError(
                f"cache must keep all tokens: layers see all before them; got a {type(layer).__name__} at {index}"
            )


def past_length(cache: Cache | None) -> int | torch.Tensor:
    """Tokens the cache holds: an int, or a copy of a static cache's int64 tensor as [1]."""
    if cache is None:
        return 0
    length = cache.get_seq_length()
    return length.clone().reshape(1) if isinstance(length, torch.Tensor) else length


def key_length(cache: Cache | None, new: int) -> int:
    """Keys that attention sees once `new` tokens were written: a static cache's whole size, or past
    + new.
    """
    return new if cache is None else cache.get_mask_sizes(new, 0)[0]


class CrossCacheLayer(DynamicLayer):
    """The place of a cross-attention layer in a decoder's cache: keys and values of pictures, kept
    while text comes and goes.

    Attributes:
        kept: bool [pictures * tiles], the tiles that have keys here, as `fusion.cross_attention`
            tells; in the first such layer alone.
    """

    kept: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new pictures, [B, heads, keys, head_dim], which may be
        none; return all.
        """
        if not self.get_seq_length():
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        elif key_states.shape[-2]:
            super().update(key_states, value_states)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Text is taken back, pictures are not."""

    def reset(self) -> None:
        """Forget pictures too."""
        super().reset()
        self.kept = None


def place_cross_layers(
    cache: Cache, cross_attention_layers: Sequence[int], layers: int
) -> CrossCacheLayer | None:
    """Put a `CrossCacheLayer` at every cross-attention layer's place, where a cache of transformers
    comes with one for text, or with none since it was made for the layers of text alone.

    Args:
        cache: changed in place, when it is first used.
        cross_attention_layers: their indices.
        layers: of the whole decoder.

    Returns:
        The first of them, or None where the decoder has none.

    Raises:
        ValueError: the cache has too few layers, or another model has written to it.
    """
    places = cache.layers
    if cache.layer_class_to_replicate is not None:
        places.extend(cache.layer_class_to_replicate() for _ in range(layers - len(places)))
    if len(places) == layers - len(cross_attention_layers) and not int(cache.get_seq_length()):
        for (
            index
        ) in cross_attention_layers:  # they rise, so that each finds those before it in place
            places.insert(index, CrossCacheLayer())
    if len(places) < layers:
        raise ValueError(f"cache must have {layers} layers, as the decoder, got {len(places)}")
    for index in cross_attention_layers:
        if not isinstance(places[index], CrossCacheLayer):
            if int(places[index].get_seq_length()):
                raise ValueError(
                    f"cache holds keys of another model at layer {index}, which attends to pictures"
                )
            places[index] = CrossCacheLayer()
    return next((places[index] for index in cross_attention_layers), None)
