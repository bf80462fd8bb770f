"""The interface between the decoder and a key-value cache."""

from collections.abc import Collection
from typing import Protocol

import torch


class Cache(Protocol):
    """Keys and values of all layers, by layer index. A layer writes once per forward pass.

    Attributes:
        num_prefix_tokens: number of visual tokens before the text.
        tile_mask: bool [images * tiles] on the CPU, the tiles with keys in the cross-attention
            layers; None before the first image.
    """

    num_prefix_tokens: int
    tile_mask: torch.Tensor | None

    @property
    def length(self) -> int | torch.Tensor:
        """Number of cached positions of the self-attention layers, read before any layer writes.
        An int, or a copy as int64 [1] if the cache's length is a tensor.
        """

    def num_keys(self, new: int) -> int:
        """Number of self-attention keys after `new` positions are written: length + new, or all
        slots of a cache of fixed size.
        """

    def update(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of new positions, [B, T, KV, D]; return all, [B, S, KV, D] with
        any strides.
        """

    def update_cross(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Append keys and values of new images, [B, 0 or more, KV, D]; return all, as `update`."""

    def in_place_obstacle(self, rows: int) -> str | None:
        """Why positions of so many rows cannot be written by `reserve` and `advance`; None where
        they can.
        """

    def reserve(
        self, new: int, cross: Collection[int] = ()
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], int]:
        """The buffers of all layers, for who writes positions in place and then calls `advance`.
        There must be a position in the cache.

        Args:
            new: positions to make room for.
            cross: indices of the layers that attend to images: theirs are the images' buffers.

        Returns:
            Keys and values, contiguous [B, kv_heads, capacity, head_dim] each, empty where a layer
            has none; and how many keys images have.
        """

    def advance(self, new: int) -> None:
        """Count `new` positions that were written after `reserve`."""
