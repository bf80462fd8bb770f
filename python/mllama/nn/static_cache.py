"""A KV cache whose length is on its device, for passes that are captured and replayed."""

from collections.abc import Collection

import torch

from mllama.nn.kv_cache import KVCache, as_loaded, as_stored


class StaticCache:
    """A view of a `KVCache`, as `mllama.nn.cache.Cache`, of fixed size. The host knows nothing of
    the length, so that a pass of one position per row is the same launches for any of them. The
    host counts positions on the `KVCache`, by its `advance`.

    Args:
        cache: has a position at least. Its buffers get room and must not move afterwards.
        new: positions to make room for.
        cross: indices of the layers that attend to images.

    Attributes:
        keys, values: the buffers, [B, kv_heads, capacity, head_dim] of each layer, empty where a
            layer has none. int8: rows of `quantize_rows` in place of head_dim values.
        length: int64 [1], on the buffers' device, where the next position is written.
    """

    def __init__(self, cache: KVCache, new: int, cross: Collection[int] = ()):
        self.keys, self.values, self._image_keys = cache.reserve(new, cross)
        self.num_prefix_tokens, self.tile_mask = cache.num_prefix_tokens, cache.tile_mask
        self._cross, self._dtype = cross, cache.dtype
        own = next(keys for layer, keys in enumerate(self.keys) if layer not in cross)
        self._capacity = own.shape[2]
        self.length = torch.full((1,), cache.length, dtype=torch.int64, device=own.device)
        for layer, values in enumerate(self.values):
            if layer not in cross:
                values[:, :, cache.length :].zero_()  # NaN times a weight of 0 would not be 0

    def num_keys(self, new: int) -> int:
        """All slots."""
        return self._capacity

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write a position, [B, 1, kv_heads, head_dim], at `length`; return all slots, [B,
        capacity, kv_heads, head_dim]. Those after it are hidden by causality.
        """
        for buffer, new in ((self.keys[layer], k), (self.values[layer], v)):
            buffer.index_copy_(2, self.length, as_stored(new, self._dtype).transpose(1, 2))
        return as_loaded(self.keys[layer], k), as_loaded(self.values[layer], v)

    def update_cross(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The images' keys and values; k and v are empty."""
        if not self._image_keys:
            return k, v
        keys, values = (x[layer][:, :, : self._image_keys] for x in (self.keys, self.values))
        return as_loaded(keys, k), as_loaded(values, v)

    def in_place_obstacle(self, rows: int) -> str | None:
        """As `mllama.nn.cache.Cache.in_place_obstacle`."""
        return None

    def reserve(
        self, new: int, cross: Collection[int] = ()
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
        """The buffers."""
        return self.keys, self.values, self._image_keys

    def advance(self, new: int) -> None:
        """Move `length`, on the device."""
        self.length.add_(new)
