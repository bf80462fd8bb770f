"""Adapts transformers' caches to `mllama.nn.cache.Cache`.

A dynamic cache has one key per token. A static one exposes all of its slots and keeps its length in
a tensor that its update changes in place, so the length is copied.
"""

import contextlib
from collections.abc import Collection, Iterator, Sequence
from typing import Any

import torch
from transformers import Cache, EncoderDecoderCache
from transformers.cache_utils import DynamicLayer, StaticLayer

from mllama.config.spec import LayerSpec, TextSpec
from mllama.ops._dispatch import FLOAT_DTYPES


def check_cache(cache: Any) -> None:
    """Raise TypeError unless it is None or a transformers cache of a decoder."""
    if cache is None:
        return
    if not isinstance(cache, Cache) or isinstance(cache, EncoderDecoderCache):
        raise TypeError(
            f"cache must be a transformers Cache of a decoder or None, got {type(cache).__name__}"
        )


class CrossCacheLayer(DynamicLayer):
    """A cross-attention layer's cache: keys and values of images, which stay when text is removed.

    Attributes:
        tile_mask: see `mllama.nn.cache.Cache`; only in the first such layer.
    """

    tile_mask: torch.Tensor | None = None

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new images, [B, heads, keys, head_dim], keys may be 0;
        return all.
        """
        if not self.get_seq_length():
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states.contiguous(), value_states.contiguous()
        elif key_states.shape[-2]:
            super().update(key_states, value_states)
        return self.keys, self.values

    def crop(self, tokens_to_remove: int) -> None:
        """Keep the images."""

    def reset(self) -> None:
        """Remove images too."""
        super().reset()
        self.tile_mask = None


class GrowingCacheLayer(DynamicLayer):
    """A dynamic layer with room after its positions, so that a token is appended without a copy of
    all of them. `keys` and `values`, [B, heads, S, head_dim], are views of its buffers, until
    someone replaces them (crops or reorders them, say): then there are new buffers.

    Args:
        layer: whose positions it takes over.

    Attributes:
        rewinds: positions that are cropped are written over, in the same buffers.
    """

    rewinds = False

    def __init__(self, layer: DynamicLayer):
        super().__init__()
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self._buffers = self._views = (torch.empty(0), torch.empty(0))

    def reserve(self, new: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers, [B, heads, capacity, head_dim], with room for `new` more positions."""
        length = self.keys.shape[2] + new
        if not self._is_own() or length > self._buffers[0].shape[2]:
            self._buffers = _with_room(self.keys, length), _with_room(self.values, length)
        return self._buffers

    def crop(self, tokens_to_remove: int) -> None:
        """Remove positions at the end, as transformers counts them."""
        own = self._is_own()
        super().crop(tokens_to_remove)
        if own and self.rewinds:
            self._views = self.keys, self.values

    def _is_own(self) -> bool:
        return self.keys is self._views[0] and self.values is self._views[1]

    def advance(self, new: int) -> None:
        """Count `new` positions that were written after those of before."""
        end = self.keys.shape[2] + new
        self._views = self._buffers[0][:, :, :end], self._buffers[1][:, :, :end]
        self.keys, self.values = self._views

    def __getstate__(self) -> dict[str, Any]:
        """Without buffers: a copy makes its own."""
        empty = (torch.empty(0), torch.empty(0))
        own = {"keys": self.keys, "values": self.values, "_buffers": empty, "_views": empty}
        return self.__dict__ | own


def _with_room(x: torch.Tensor, length: int) -> torch.Tensor:
    """A copy of [B, heads, S, head_dim] with room for more than `length` positions."""
    B, heads, S, D = x.shape
    buffer = x.new_empty(B, heads, length + length // 2 + 64, D)
    buffer[:, :, :S] = x
    return buffer


class TransformersCache:
    """A transformers cache with the interface that the decoder needs. All state is in the wrapped
    cache, so a new wrapper per call loses nothing.

    Args:
        cache: dynamic or static, created for all layers or for the self-attention layers only;
            modified in place at its first use.
        text: the decoder's spec.

    Layers that drop tokens outside a window are replaced by layers that keep them, because the
    decoder applies its windows itself.

    Raises:
        TypeError: not a transformers cache of a decoder.
        ValueError: the cache drops tokens in another way, has the wrong number of layers, or was
            written by another model.
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
        """Number of visual tokens before the text."""
        return num_prefix_tokens(self.cache)

    @num_prefix_tokens.setter
    def num_prefix_tokens(self, count: int) -> None:
        self.cache.num_prefix_tokens = count

    @property
    def tile_mask(self) -> torch.Tensor | None:
        """bool [images * tiles]: the tiles that have keys."""
        return None if self._place is None else self._place.tile_mask

    @tile_mask.setter
    def tile_mask(self, mask: torch.Tensor | None) -> None:
        self._place.tile_mask = mask

    @property
    def length(self) -> int | torch.Tensor:
        """Number of cached tokens: an int, or a copy of a static cache's int64 tensor as [1]."""
        length = self.cache.get_seq_length(self._first)
        return length.clone().reshape(1) if isinstance(length, torch.Tensor) else length

    def num_keys(self, new: int) -> int:
        """A static cache's size, or length + new."""
        return self.cache.get_mask_sizes(new, self._first)[0]

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, KV, D] -> all keys and values, [B, S, KV, D]."""
        k, v = self.cache.update(k.transpose(1, 2), v.transpose(1, 2), layer)  # (B, KV, S, D)
        return k.transpose(1, 2), v.transpose(1, 2)

    update_cross = update  # a CrossCacheLayer has an append of its own

    def in_place_obstacle(self, rows: int) -> str | None:
        """As `mllama.nn.cache.Cache.in_place_obstacle`."""
        if self.cache.offloading:
            return "its cache is offloaded"
        allowed = DynamicLayer, GrowingCacheLayer, CrossCacheLayer
        other = next((one for one in self.cache.layers if type(one) not in allowed), None)
        if other is not None:
            return f"its cache has a {type(other).__name__}"
        keys = self.cache.layers[self._first].keys
        if len(keys) != rows or keys.dtype not in FLOAT_DTYPES:
            return f"its cache has {len(keys)} rows of {keys.dtype}"
        return None

    def reserve(
        self, new: int, cross: Collection[int] = ()
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
        """As `mllama.nn.cache.Cache.reserve`; layers without room become ones with room."""
        keys, values, image_keys = [], [], 0
        for index, layer in enumerate(self.cache.layers):
            if index in cross:
                image_keys = max(image_keys, layer.get_seq_length())
                own = (layer.keys, layer.values) if image_keys else (torch.empty(0),) * 2
            else:
                if type(layer) is DynamicLayer:
                    layer = self.cache.layers[index] = GrowingCacheLayer(layer)
                layer.rewinds = getattr(self.cache, "rewinds", False)
                own = layer.reserve(new)
            keys.append(own[0])
            values.append(own[1])
        return keys, values, image_keys

    def advance(self, new: int) -> None:
        """Count `new` positions that were written after `reserve`."""
        for layer in self.cache.layers:
            if isinstance(layer, GrowingCacheLayer):
                layer.advance(new)


@contextlib.contextmanager
def rewinding(cache: Cache | None) -> Iterator[None]:
    """Meanwhile nobody keeps views of a cache: what is cropped, as drafts are, is written over."""
    if cache is None:
        yield
        return
    cache.rewinds = True
    try:
        yield
    finally:
        del cache.rewinds
        for layer in cache.layers:
            if isinstance(layer, GrowingCacheLayer):
                layer.rewinds = False


def num_prefix_tokens(cache: Cache | None) -> int:
    """Number of visual tokens before the text in a transformers cache."""
    return getattr(cache, "num_prefix_tokens", 0)


def keep_all_tokens(cache: Cache, specs: Sequence[LayerSpec], size: int = 0) -> None:
    """Replace empty sliding-window layers by full ones, if the decoder's layer has that window;
    transformers creates such a cache from a Gemma 2 or 3 config.

    Args:
        cache: changed in place.
        specs: the decoder's layers.
        size: tokens that a static cache was made for; 0 is as its layers without a window say.
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
        if static and window is not None:  # the minimum of its window and its size
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
    """Put a `CrossCacheLayer` at every cross-attention layer's index, in place of a layer for text,
    or inserted if the cache was created for the self-attention layers only. Returns the first one.
    """
    places = cache.layers
    if cache.layer_class_to_replicate is not None:
        missing = num_layers - len(places)
        places.extend(cache.layer_class_to_replicate() for _ in range(missing))
    text_alone = len(places) == num_layers - len(cross_attention_layers)
    if text_alone and not int(cache.get_seq_length()):
        for index in cross_attention_layers:  # ascending: earlier ones are already in place
            places.insert(index, CrossCacheLayer())
    if len(places) < num_layers:
        raise ValueError(f"cache must have {num_layers} layers, as the decoder, got {len(places)}")
    for index in cross_attention_layers:
        if not isinstance(places[index], CrossCacheLayer):
            if int(places[index].get_seq_length()):
                raise ValueError(
                    f"cache has keys of another model at layer {index}, which attends to images"
                )
            places[index] = CrossCacheLayer()
    return places[cross_attention_layers[0]]  # type: ignore[return-value]
