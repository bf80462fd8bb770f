"""Caches of transformers in the terms of `mllama.nn.cache.Cache`.

A dynamic cache answers with its number of tokens; a static one shows all of its slots, filled or
not, and keeps its length in a tensor that its update changes in place: hence copies of it.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from mllama.config.spec import LayerSpec, TextSpec


def check_cache(cache: Any) -> None:
    """Raise TypeError unless it is None or a decoder's cache of transformers."""
    if cache is None:
        return
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            f"cache must be a transformers Cache of a decoder or None, got {type(cache).__name__}"
        )


class CrossCacheLayer(DynamicLayer):
    """A cross-attention layer's place in a cache: keys and values of images, which stay while text
    comes and goes.

    Attributes:
        tile_mask: see `mllama.nn.cache.Cache`; in the first such layer alone.
    """

    tile_mask: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new images, [B, heads, keys, head_dim], which may be none;
        return all.
        """
        if not self.get_seq_length():
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
        elif key_states.shape[-2]:
            super().update(key_states, value_states)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Images stay when text is removed."""

    def reset(self) -> None:
        """Remove images too."""
        super().reset()
        self.tile_mask = None


class TransformersCache:
    """A transformers cache as the decoder sees it. All state is the wrapped cache's own, so that
    wrapping it anew for every call loses nothing.

    Args:
        cache: dynamic or static, made for all layers or for the self-attention layers alone;
            changed in place when it is first used.
        text: the decoder's spec.

    Layers that forget what lies outside a window are replaced by others that do not, since the
    decoder's own windows hide it.

    Raises:
        TypeError: no transformers cache of a decoder.
        ValueError: a cache that forgets tokens otherwise, has too few layers, or was written to by
            another model.
    """

    def __init__(self, cache: Cache, text: TextSpec):
        check_cache(cache)
        keep_all_tokens(cache, text.layers)
        self.cache = cache
        cross = text.cross_attention_layers
        self._place = _place_cross_layers(cache, cross, text.num_hidden_layers) if cross else None
        self._first = next(i for i in range(text.num_hidden_layers) if i not in cross)

    @property
    def num_prefix_tokens(self) -> int:
        """Visual tokens that stand before the text."""
        return num_prefix_tokens(self.cache)

    @num_prefix_tokens.setter
    def num_prefix_tokens(self, count: int) -> None:
        self.cache.num_prefix_tokens = count

    @property
    def tile_mask(self) -> torch.Tensor | None:
        """bool [images * tiles]: which tiles have keys."""
        return None if self._place is None else self._place.tile_mask

    @tile_mask.setter
    def tile_mask(self, mask: torch.Tensor | None) -> None:
        self._place.tile_mask = mask

    @property
    def length(self) -> int | torch.Tensor:
        """Tokens in the cache: an int, or a copy of a static cache's int64 tensor as [1]."""
        length = self.cache.get_seq_length(self._first)
        return length.clone().reshape(1) if isinstance(length, torch.Tensor) else length

    def num_keys(self, new: int) -> int:
        """A static cache's whole size, or length + new."""
        return self.cache.get_mask_sizes(new, self._first)[0]

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, KV, D] -> all keys and values, [B, S, KV, D]."""
        k, v = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)  # (B, KV, S, D)
        return k.transpose(1, 2), v.transpose(1, 2)

    update_cross = update  # a CrossCacheLayer appends in its own way


def num_prefix_tokens(cache: Cache | None) -> int:
    """Visual tokens that stand before the text in a transformers cache."""
    return getattr(cache, "num_prefix_tokens", 0)


def keep_all_tokens(cache: Cache, specs: Sequence[LayerSpec], size: int = 0) -> None:
    """Replace empty layers with a sliding window by layers without, where the decoder's layer has
    that window; transformers makes such a cache of the config of a Gemma 2 or 3.

    Args:
        cache: changed in place.
        specs: the decoder's layers.
        size: for how many tokens a static cache was made; 0 is as its layers without a window say.
    """
    layers = cache.layers
    if not any(layer.is_sliding for layer in layers):
        return
    sizes = [_size(layer) for layer in layers if not layer.is_sliding]
    size = max(sizes) if sizes else size  # torch.compile takes no `default`
    for index, layer in enumerate(layers):
        if not layer.is_sliding:
            continue
        window = specs[index].window if index < len(specs) else None
        static = isinstance(layer, StaticLayer)
        same = window == (layer.max_cache_len if static else layer.sliding_window)
        if static and window is not None:  # the smaller of its window and its size
            same = size > 0 and layer.max_cache_len == min(window, size)
        if not same or int(layer.get_seq_length()):
            raise ValueError(
                "cache must keep all tokens: layers see all before them, or those in their window; "
                f"got a {type(layer).__name__} at {index}"
            )
        layers[index] = StaticLayer(max_cache_len=size) if static else DynamicLayer()


def _size(layer: Any) -> int:
    return getattr(layer, "max_cache_len", 0)


def _place_cross_layers(
    cache: Cache, cross_attention_layers: Sequence[int], num_layers: int
) -> CrossCacheLayer:
    """Put a `CrossCacheLayer` at every cross-attention layer's place, where a cache comes with a
    layer for text, or with none since it was made for the self-attention layers alone. Returns the
    first of them.
    """
    places = cache.layers
    if cache.layer_class_to_replicate is not None:
        missing = num_layers - len(places)
        places.extend(cache.layer_class_to_replicate() for _ in range(missing))
    text_alone = len(places) == num_layers - len(cross_attention_layers)
    if text_alone and not int(cache.get_seq_length()):
        for index in cross_attention_layers:  # ascending: each finds those before it in place
            places.insert(index, CrossCacheLayer())
    if len(places) < num_layers:
        raise ValueError(f"cache must have {num_layers} layers, as the decoder, got {len(places)}")
    for index in cross_attention_layers:
        if not isinstance(places[index], CrossCacheLayer):
            if int(places[index].get_seq_length()):
                raise ValueError(
                    f"cache holds keys of another model at layer {index}, which attends to images"
                )
            places[index] = CrossCacheLayer()
    return places[cross_attention_layers[0]]  # type: ignore[return-value]
