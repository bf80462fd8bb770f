"""What the decoder and its layers ask of a key-value cache."""

from typing import Protocol

import torch


class Cache(Protocol):
    """Keys and values of all layers, by the layers' index. Layers write once per forward pass.

    Attributes:
        num_prefix_tokens: visual tokens that stand before the text in it.
        tile_mask: bool [images * tiles] on the CPU, the tiles that have keys in the cross-attention
            layers; None where there are none yet.
    """

    num_prefix_tokens: int
    tile_mask: torch.Tensor | None

    @property
    def length(self) -> int | torch.Tensor:
        """Positions that the self-attention layers hold, read before any layer writes: an int, or
        int64 [1] of a cache whose length is a tensor, a copy.
        """

    def num_keys(self, new: int) -> int:
        """Keys that self-attention sees once `new` positions are written: length + new, or of a
        cache of fixed size all of its slots.
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
