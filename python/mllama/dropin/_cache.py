"""The key-value cache of older scripts."""

from collections.abc import Iterable

import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer


class KVCache(DynamicCache):
    """A transformers cache that also answers in the older names.

    `update(key_states, value_states, layer_idx)` appends tensors [B, key-value heads, T, head_dim]
    and returns all of that layer.
    """

    @classmethod
    def of(cls, pairs: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> "KVCache":
        """A cache that holds (k, v) for each layer. They are not copied: what is appended makes new
        tensors.
        """
        cache = cls()
        for keys, values in pairs:
            layer = DynamicLayer()
            layer.lazy_initialization(keys, values)
            layer.keys, layer.values = keys, values
            cache.layers.append(layer)
        return cache

    def num_items(self) -> int:
        """Tokens that are in it."""
        return self.get_seq_length()

    @property
    def key_cache(self) -> list[torch.Tensor]:
        """Keys by layer, [B, key-value heads, tokens, head_dim]."""
        return [layer.keys for layer in self.layers if layer.is_initialized]

    @property
    def value_cache(self) -> list[torch.Tensor]:
        """Values by layer, as the keys."""
        return [layer.values for layer in self.layers if layer.is_initialized]
