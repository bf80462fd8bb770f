"""The key-value cache of older scripts."""

import torch
from transformers import DynamicCache


class KVCache(DynamicCache):
    """A transformers cache that also answers in the older names. `KVCache()` is empty; `KVCache(pairs)` holds a (k, v) per layer.

    `update(key_states, value_states, layer_idx)` appends tensors [B, key-value heads, T, head_dim] and returns all of that layer.
    """

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
