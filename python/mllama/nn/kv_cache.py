"""The key-value cache of a decoder: preallocated, grown by doubling."""

from collections.abc import Collection

import torch


class _Buffer:
    """Keys and values of one layer, [B, kv_heads, capacity, head_dim] each, the first `length` of
    them written.
    """

    def __init__(self) -> None:
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.length = 0

    def append(
        self, k: torch.Tensor, v: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, kv_heads, head_dim] in -> all [B, S, kv_heads, head_dim], as views."""
        start, end = self.length, self.length + k.shape[1]
        if not self._fits(k, end):
            self._grow(k, v, end, capacity)
        self.keys[:, :, start:end] = k.transpose(1, 2)  # type: ignore[index]
        self.values[:, :, start:end] = v.transpose(1, 2)  # type: ignore[index]
        self.length = end
        return self.read()

    def reserve(self, new: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers, with room for `new` more positions."""
        if self.length + new > self.keys.shape[2]:  # type: ignore[union-attr]
            k, v = (x[:, :, :new].transpose(1, 2) for x in (self.keys, self.values))  # type: ignore[index]
            self._grow(k, v, self.length + new, capacity)
        return self.keys, self.values  # type: ignore[return-value]

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
        """An empty buffer is made anew for another batch, dtype or device."""
        keys = self.keys
        if keys is None or end > keys.shape[2]:
            return False
        same = keys.shape[0] == k.shape[0] and keys.dtype == k.dtype and keys.device == k.device
        return same or self.length > 0

    def _grow(self, k: torch.Tensor, v: torch.Tensor, end: int, capacity: int) -> None:
        kept = self.read() if self.length else None
        capacity = max(end, capacity, 2 * self.length)
        B, _, KV, D = k.shape
        self.keys = k.new_empty(B, KV, capacity, D)
        self.values = v.new_empty(B, KV, capacity, v.shape[3])
        if kept is not None:
            self.keys[:, :, : self.length] = kept[0].transpose(1, 2)
            self.values[:, :, : self.length] = kept[1].transpose(1, 2)


class KVCache:
    """Keys and values of all layers of a decoder.

    A layer that attends to text stores one key per position; a layer that attends to images stores
    the keys of the images, which `crop` leaves alone. Buffers are [B, kv_heads, capacity,
    head_dim], made at the first update and doubled when full. For inference: no gradient flows
    through them.

    Args:
        num_layers: layers of the decoder.
        capacity: positions to make room for at once.

    Attributes:
        num_prefix_tokens: visual tokens that stand before the text, counted in `length`.
        tile_mask: bool [images * tiles] on the CPU: the tiles that have keys in the layers that
            attend to images; None before the first image.
    """

    def __init__(self, num_layers: int, capacity: int = 0):
        self.capacity = capacity
        self._text = [_Buffer() for _ in range(num_layers)]
        self._cross = [_Buffer() for _ in range(num_layers)]
        self.num_prefix_tokens = 0
        self.tile_mask: torch.Tensor | None = None

    @property
    def length(self) -> int:
        """Positions in the layers that attend to text, as their first one has them: read it before
        a pass writes.
        """
        return next((buffer.length for buffer in self._text if buffer.length), 0)

    def num_keys(self, new: int) -> int:
        """Keys that attention sees once `new` more positions are written."""
        return self.length + new

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append positions: [B, T, kv_heads, head_dim] in, all [B, S, kv_heads, head_dim] out, as
        views of the buffers.
        """
        return self._text[layer].append(k, v, self.capacity)

    def reserve(
        self, new: int, cross: Collection[int] = ()
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
        """The buffers of all layers, for who writes positions in place and then calls `advance`.
        There must be a position in the cache.

        Args:
            new: positions to make room for.
            cross: indices of the layers that attend to images: theirs are the images' buffers.

        Returns:
            Keys and values, [B, kv_heads, capacity, head_dim] each, empty where a layer has none;
            and how many keys images have.
        """
        keys, values, image_keys = [], [], 0
        for index, (text, image) in enumerate(zip(self._text, self._cross, strict=True)):
            if index not in cross:
                own = text.reserve(new, self.capacity)
            elif image.length:
                own, image_keys = (image.keys, image.values), image.length
            else:
                own = (torch.empty(0), torch.empty(0))
            keys.append(own[0])
            values.append(own[1])
        return keys, values, image_keys

    def advance(self, new: int) -> None:
        """Count `new` positions that were written after `reserve`."""
        for buffer in self._text:
            buffer.length += new if buffer.length else 0

    def update_cross(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append the keys of new images, [B, keys, kv_heads, head_dim], of which there may be none;
        return all.
        """
        buffer = self._cross[layer]
        if k.shape[1]:
            return buffer.append(k, v, 0)
        return buffer.read() if buffer.length else (k, v)

    def crop(self, length: int) -> None:
        """Drop positions from the end until `length` are left; keys of images stay.

        A pass that was interrupted leaves layers of different lengths: cropping to the length
        before it restores the cache.

        Raises:
            ValueError: length is negative or more than there is.
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"length must be 0 to {self.length}, the cache's own, got {length}")
        for buffer in self._text:
            buffer.length = min(buffer.length, length)
        self.num_prefix_tokens = min(self.num_prefix_tokens, length)

    def reorder(self, rows: torch.Tensor) -> None:
        """Make the batch of these of its rows, int64 [new batch]: for beams, to repeat rows, or to
        go on with some.
        """
        for buffer in (*self._text, *self._cross):
            buffer.reorder(rows)

    def reset(self) -> None:
        """Forget text and images; the buffers are used again where they fit."""
        for buffer in (*self._text, *self._cross):
            buffer.length = 0
        self.num_prefix_tokens, self.tile_mask = 0, None
