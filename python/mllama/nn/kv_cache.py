"""A decoder's key-value cache: preallocated, grown by doubling."""

import torch


class _Buffer:
    """Keys and values of one layer, [B, kv_heads, capacity, head_dim] each; `length` are in use."""

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.length = 0

    def append(
        self, k: torch.Tensor, v: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append [B, T, kv_heads, head_dim]; return all as views, [B, S, kv_heads, head_dim]."""
        start, end = self.length, self.length + k.shape[1]
        if not self._fits(k, end):
            self._grow(k, v, end, capacity)
        self.keys[:, :, start:end] = k.transpose(1, 2)  # type: ignore[index]
        self.values[:, :, start:end] = v.transpose(1, 2)  # type: ignore[index]
        self.length = end
        return self.read()

    def read(self) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, [B, S, kv_heads, head_dim]."""
        return (
            self.keys[:, :, : self.length].transpose(1, 2),  # type: ignore[index]
            self.values[:, :, : self.length].transpose(1, 2),  # type: ignore[index]
        )

    def reorder(self, rows: torch.Tensor) -> None:
        if self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys[rows], self.values[rows]

    def _fits(self, k: torch.Tensor, end: int) -> bool:
        """Whether the buffers can be used. Empty ones are reallocated for another batch, dtype or
        device.
        """
        keys = self.keys
        if keys is None or end > keys.shape[2]:
            return False
        same = keys.shape[0] == k.shape[0] and keys.dtype == k.dtype and keys.device == k.device
        return same or self.length > 0

    def _grow(self, k: torch.Tensor, v: torch.Tensor, end: int, capacity: int) -> None:
        old = self.read() if self.length else None
        capacity = max(end, capacity, 2 * self.length)
        B, _, KV, D = k.shape
        self.keys = k.new_empty(B, KV, capacity, D)
        self.values = v.new_empty(B, KV, capacity, v.shape[3])
        if old is not None:
            self.keys[:, :, : self.length] = old[0].transpose(1, 2)
            self.values[:, :, : self.length] = old[1].transpose(1, 2)


class KVCache:
    """Keys and values of all layers of a decoder.

    Self-attention layers store one key per position. Cross-attention layers store the images'
    keys, which `crop` does not change. Buffers are [B, kv_heads, capacity, head_dim], allocated at
    the first update and doubled when full. For inference only: gradients do not flow through them.

    Args:
        num_layers: number of layers of the decoder.
        capacity: positions to allocate at first.

    Attributes:
        num_prefix_tokens: number of visual tokens before the text, included in `length`.
        tile_mask: bool [images * tiles] on the CPU: the tiles with keys in the cross-attention
            layers; None before the first image.
    """

    def __init__(self, num_layers: int, capacity: int = 0):
        self.capacity = capacity
        self._text = [_Buffer() for _ in range(num_layers)]
        self._cross = [_Buffer() for _ in range(num_layers)]
        self.num_prefix_tokens = 0
        self.tile_mask: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Number of cached positions in the first self-attention layer; read it before a pass
        writes.
        """
        return next((buffer.length for buffer in self._text if buffer.length), 0)

    def num_keys(self, new: int) -> int:
        """Number of keys after `new` more positions are written."""
        return self.length + new

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append positions [B, T, kv_heads, head_dim]; return all [B, S, kv_heads, head_dim], as
        views of the buffers.
        """
        return self._text[layer].append(k, v, self.capacity)

    def update_cross(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys and values of new images, [B, keys, kv_heads, head_dim], keys may be 0;
        return all.
        """
        buffer = self._cross[layer]
        if k.shape[1]:
            return buffer.append(k, v, 0)
        return buffer.read() if buffer.length else (k, v)

    def crop(self, length: int) -> None:
        """Drop positions at the end until `length` are left; the images' keys stay.

        After an interrupted pass, layers differ in length: crop to the length before the pass.

        Raises:
            ValueError: length is negative or more than the cache's.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be 0 to {self.length}, the cache's own, got {length}")
        for buffer in self._text:
            buffer.length = min(buffer.length, length)
        self.num_prefix_tokens = min(self.num_prefix_tokens, length)

    def reorder(self, rows: torch.Tensor) -> None:
        """Select rows of the batch by index, int64 [new batch], to reorder beams, repeat or drop
        rows.
        """
        for buffer in (*self._text, *self._cross):
            buffer.reorder(rows)

    def reset(self) -> None:
        """Empty the cache; buffers are reused where they fit."""
        for buffer in (*self._text, *self._cross):
            buffer.length = 0
        self.num_prefix_tokens, self.tile_mask = 0, None
