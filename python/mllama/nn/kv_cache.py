"""A decoder's key-value cache: preallocated, grown by doubling, in a dtype of its own if asked."""

from collections.abc import Collection, Mapping, Sequence

import torch

from mllama.nn.checks import check_count, check_integers
from mllama.ops.quantized_rows import dequantize_rows, quantize_rows

# Names of the dtypes that keys and values may be stored in.
CACHE_DTYPES = {
    "f32": torch.float32,
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "int8": torch.int8,
}


class _Buffer:
    """Keys and values of one layer, [B, kv_heads, capacity, head_dim] each. The first `length`
    positions are in use. int8: rows of `quantize_rows` in place of head_dim values.
    """

    def __init__(self, dtype: torch.dtype | None) -> None:
        self.dtype = dtype
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.length = 0

    def append(
        self, k: torch.Tensor, v: torch.Tensor, capacity: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, T, kv_heads, head_dim] in -> all [B, S, kv_heads, head_dim], as views."""
        if k.dim() != 4 or v.shape[:3] != k.shape[:3]:
            raise ValueError(
                "k and v must be [batch, tokens, kv_heads, head_dim], "
                f"got {list(k.shape)} and {list(v.shape)}"
            )
        new_k, new_v = as_stored(k, self.dtype), as_stored(v, self.dtype)
        alike = _is_alike(self.keys, new_k) and _is_alike(self.values, new_v)
        if self.length and not alike:
            raise ValueError(
                f"k and v must be {_of(self.keys)} and {_of(self.values)} as what is cached, "
                f"got {list(k.shape)} {k.dtype} and {list(v.shape)} {v.dtype}"
            )
        start, end = self.length, self.length + k.shape[1]
        if not alike or end > self.keys.shape[2]:  # type: ignore[union-attr]
            self._grow(new_k, new_v, end, capacity)
        self.keys[:, :, start:end] = new_k.transpose(1, 2)  # type: ignore[index]
        self.values[:, :, start:end] = new_v.transpose(1, 2)  # type: ignore[index]
        self.length = end
        return self.read(k, v)

    def reserve(self, new: int, capacity: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The buffers, with room for `new` more positions."""
        if self.length + new > self.keys.shape[2]:  # type: ignore[union-attr]
            k, v = (x[:, :, :new].transpose(1, 2) for x in (self.keys, self.values))  # type: ignore[index]
            self._grow(k, v, self.length + new, capacity)
        return self.keys, self.values  # type: ignore[return-value]

    def read(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """All keys and values, [B, S, kv_heads, head_dim], of the head_dim and dtype of k and v:
        views if they are stored so, else copies.
        """
        keys, values = (x[:, :, : self.length] for x in (self.keys, self.values))  # type: ignore[index]
        return as_loaded(keys, k), as_loaded(values, v)

    @property
    def batch(self) -> int:
        return 0 if self.keys is None or not self.length else len(self.keys)

    def reorder(self, rows: torch.Tensor) -> None:
        if self.batch and self.keys is not None and self.values is not None:
            rows = rows.to(self.keys.device)
            self.keys, self.values = self.keys[rows], self.values[rows]

    def _grow(self, k: torch.Tensor, v: torch.Tensor, end: int, capacity: int) -> None:
        old = (self.keys, self.values) if self.length else None
        capacity = max(end, capacity, 2 * self.length)
        B, _, KV, D = k.shape
        self.keys = k.new_empty(B, KV, capacity, D)
        self.values = v.new_empty(B, KV, capacity, v.shape[3])
        if old is not None:
            self.keys[:, :, : self.length] = old[0][:, :, : self.length]  # type: ignore[index]
            self.values[:, :, : self.length] = old[1][:, :, : self.length]  # type: ignore[index]


def as_stored(x: torch.Tensor, dtype: torch.dtype | None) -> torch.Tensor:
    """Keys or values [..., head_dim] as buffers of a dtype have them; None: as they are."""
    if dtype is None:
        return x
    return quantize_rows(x) if dtype == torch.int8 else x.to(dtype)


def as_loaded(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """A buffer's [B, kv_heads, S, ...] -> [B, S, kv_heads, head_dim], of the head_dim and dtype of
    `like`: a view if it is stored so.
    """
    if rows.dtype == torch.int8:
        rows = dequantize_rows(rows, like.shape[-1], like.dtype)
    return rows.to(like.dtype).transpose(1, 2)


def _is_alike(buffer: torch.Tensor | None, new: torch.Tensor) -> bool:
    """Whether a buffer, [B, kv_heads, capacity, head_dim], takes [B, T, kv_heads, head_dim]."""
    if buffer is None or buffer.dtype != new.dtype or buffer.device != new.device:
        return False
    B, KV, _, D = buffer.shape
    return (new.shape[0], *new.shape[2:]) == (B, KV, D)


def _of(buffer: torch.Tensor | None) -> str:
    B, KV, _, D = buffer.shape  # type: ignore[union-attr]
    return f"[{B}, tokens, {KV}, {D}] {buffer.dtype}"  # type: ignore[union-attr]


class KVCache:
    """Keys and values of all layers of a decoder.

    Self-attention layers store one key per position. Cross-attention layers store the images'
    keys, which `crop` does not change. Buffers are [B, kv_heads, capacity, head_dim], allocated at
    the first update and doubled when full. For inference, under torch.no_grad(): they are written
    in place.

    With a dtype other than the activations', `update` returns copies in theirs: one layer's keys
    and values at a time take memory twice. `decode_step` reads the buffers as they are.

    Args:
        num_layers: number of layers of the decoder.
        capacity: positions to allocate at first.
        dtype: what keys and values are stored in: torch.float32, bfloat16, float16, or int8, 8.5
            bits a value with a scale for 32 values of a head. Default: the activations' dtype.

    Attributes:
        capacity, dtype: see the arguments; capacity may be changed.
        num_prefix_tokens: number of visual tokens before the text, included in `length`.
        tile_mask: bool [images * tiles] on the CPU: the tiles with keys in the cross-attention
            layers; None before the first image.

    Raises:
        TypeError, ValueError, IndexError: of every method, an argument of another type, shape or
            range; the cache is as before.
    """

    def __init__(self, num_layers: int, capacity: int = 0, dtype: torch.dtype | None = None):
        check_count("num_layers", num_layers)
        check_count("capacity", capacity, 0)
        if dtype not in (None, *CACHE_DTYPES.values()):
            raise ValueError(
                f"dtype must be one of {', '.join(map(str, CACHE_DTYPES.values()))}, got {dtype!r}"
            )
        self.capacity, self.dtype = capacity, dtype
        self._text = [_Buffer(dtype) for _ in range(num_layers)]
        self._cross = [_Buffer(dtype) for _ in range(num_layers)]
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
        views of the buffers where those have k's dtype.
        """
        return self._at(self._text, layer).append(k, v, self.capacity)

    def in_place_obstacle(self, rows: int) -> str | None:
        """As `mllama.nn.cache.Cache.in_place_obstacle`."""
        batch = next((buffer.batch for buffer in self._text if buffer.length), rows)
        return None if batch == rows else f"its cache has {batch} rows"

    def reserve(
        self, new: int, cross: Collection[int] = ()
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
        """As `mllama.nn.cache.Cache.reserve`; int8 buffers are [B, kv_heads, capacity,
        row_bytes(head_dim)].
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
        """Append the keys and values of new images, [B, keys, kv_heads, head_dim], keys may be 0;
        return all.
        """
        buffer = self._at(self._cross, layer)
        if k.shape[1]:
            return buffer.append(k, v, 0)
        return buffer.read(k, v) if buffer.length else (k, v)

    def image_keys(self) -> dict[int, tuple[torch.Tensor, torch.Tensor]]:
        """Keys and values of the images by layer, [B, kv_heads, keys, head_dim], as they are
        stored: int8 has rows of `quantize_rows`.
        """
        return {
            layer: (buffer.keys[:, :, : buffer.length], buffer.values[:, :, : buffer.length])
            for layer, buffer in enumerate(self._cross)
            if buffer.keys is not None and buffer.values is not None and buffer.length
        }

    def set_image_keys(
        self, keys: Mapping[int, tuple[torch.Tensor, torch.Tensor]], tile_mask: torch.Tensor | None
    ) -> None:
        """Replace the images' keys and values by what `image_keys` returned for others. They are
        not copied, and never written to.

        Args:
            keys: by layer; a layer that is not named has none.
            tile_mask: see the attribute.
        """
        for layer in keys:
            self._at(self._cross, layer)
        for layer, buffer in enumerate(self._cross):
            buffer.keys, buffer.values = keys.get(layer, (None, None))
            buffer.length = 0 if buffer.keys is None else buffer.keys.shape[2]
        self.tile_mask = tile_mask

    def _at(self, buffers: list[_Buffer], layer: int) -> _Buffer:
        if not 0 <= layer < len(buffers):
            raise IndexError(f"layer must be 0 to {len(buffers) - 1}, the cache's own, got {layer}")
        return buffers[layer]

    def crop(self, length: int) -> None:
        """Drop positions at the end until `length` are left; the images' keys stay.

        After an interrupted pass, layers differ in length: crop to the length before the pass.
        """
        check_count("length", length, 0)
        if length > self.length:
            raise ValueError(f"length must be at most {self.length}, the cache's own, got {length}")
        for buffer in self._text:
            buffer.length = min(buffer.length, length)
        self.num_prefix_tokens = min(self.num_prefix_tokens, length)

    def reorder(self, rows: torch.Tensor) -> None:
        """Select rows of the batch by index, int64 [new batch], to reorder beams, repeat or drop
        rows.
        """
        check_integers("rows", rows, [torch.int64])
        batch = max((buffer.batch for buffer in (*self._text, *self._cross)), default=0)
        if rows.dim() != 1 or (batch and not bool(((rows >= 0) & (rows < batch)).all())):
            raise ValueError(f"rows must be [new batch], of 0 to {batch - 1}, got {rows.tolist()}")
        for buffer in (*self._text, *self._cross):
            buffer.reorder(rows)

    def move_padding(self, start: int, length: int, padding: Sequence[int]) -> None:
        """Put padding before the positions `start` to `start + length`, which it stands behind.
        Keys do not know their places, so only masks change.

        Args:
            start, length: positions that are moved, in every row.
            padding: number of padded positions behind them, for each row.
        """
        end = start + length
        if not 0 <= start <= end <= end + max(padding, default=0) <= self.length:
            raise ValueError(
                f"start, length and padding must lie within {self.length} positions, got {start}, "
                f"{length} and {list(padding)}"
            )
        for buffer in self._text:
            if not buffer.length:
                continue
            for row, count in enumerate(padding):
                for x in (buffer.keys, buffer.values):
                    moved = x[row, :, start:end].clone()  # type: ignore[index]
                    x[row, :, start + count : end + count] = moved  # type: ignore[index]

    def reset(self) -> None:
        """Empty the cache; the text's buffers are reused where they fit."""
        for buffer in self._text:
            buffer.length = 0
        self.num_prefix_tokens = 0
        self.set_image_keys({}, None)  # theirs may be another's memory
