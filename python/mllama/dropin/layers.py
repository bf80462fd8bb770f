"""Parts of the older decoder: KV cache, rotary tables, masks, norm."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

from mllama import ops
from mllama.dropin.config import rope_scaling, text_config
from mllama.hf.names import DynamicCache, PretrainedConfig
from mllama.nn import norm
from mllama.nn.rope import RotaryEmbedding

KeyValue = tuple[torch.Tensor, torch.Tensor]


@contextmanager
def made_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Make parameters in this dtype; None leaves torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class KVCache(DynamicCache):
    """A transformers cache with the older names: `num_items()`, `key_cache`, `value_cache`."""

    def num_items(self) -> int:
        """Number of cached tokens."""
        return self.get_seq_length()

    @property
    def key_cache(self) -> list[torch.Tensor]:
        """Keys of each layer, [B, KV, tokens, D]."""
        return [layer.keys for layer in self.layers if layer.is_initialized]

    @property
    def value_cache(self) -> list[torch.Tensor]:
        """Values of each layer, as the keys."""
        return [layer.values for layer in self.layers if layer.is_initialized]

    def pair(self, layer_idx: int) -> KeyValue:
        """Keys and values of a layer."""
        return self.layers[layer_idx].keys, self.layers[layer_idx].values


def num_cached(kv_cache: KVCache | None) -> int:
    """Tokens in a cache; TypeError for what is none."""
    if kv_cache is not None and not isinstance(kv_cache, KVCache):
        raise TypeError(f"kv_cache must be a KVCache or None, got {type(kv_cache).__name__}")
    return 0 if kv_cache is None else kv_cache.num_items()


class RMSNorm(norm.RMSNorm):
    """Llama's root-mean-square norm, of x or of x + residual; also `FusedRMSNorm`."""

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps)


# ---- rotary positions


def compute_rope_params(
    head_dim: int,
    theta_base: float = 10000,
    context_length: int = 4096,
    freq_config: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float32,
) -> KeyValue:
    """(cos, sin) of positions 0 to context_length - 1, each [context_length, head_dim].

    The two halves of a row are equal. `freq_config` is Llama 3's frequency scaling. Angles are
    float32 whatever the dtype of the tables.

    Raises:
        ValueError: an odd head_dim, no position, a number of freq_config that is missing.
    """
    if not isinstance(context_length, int) or context_length < 1:
        raise ValueError(f"context_length must be an integer of at least 1, got {context_length!r}")
    frequencies = ops.rope_frequencies(head_dim, theta_base, rope_scaling(freq_config))
    positions = torch.arange(context_length)[None]
    cos, sin = (
        torch.cat([half, half], -1).to(dtype) for half in ops.rope_tables(positions, frequencies)
    )
    return cos[0], sin[0]


def rope(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate x [..., T, D] to the first T positions of the tables [positions, D] or [..., T, D];
    element i with i + D/2. Computed in float32 and rounded once.

    Raises:
        ValueError: an odd D, or tables of another size.
    """
    tokens, size = x.shape[-2:]
    cos, sin = cos[..., :tokens, :], sin[..., :tokens, :]
    if size % 2 or not cos.shape[-2:] == sin.shape[-2:] == (tokens, size):
        found = [list(table.shape) for table in (x, cos, sin)]
        raise ValueError(f"x, cos and sin must be [tokens, head_dim], head_dim even, got {found}")
    first, second = x.float().chunk(2, -1)  # (..., T, D/2) each
    turned = torch.cat([-second, first], -1)
    return (x.float() * cos + turned * sin).to(x.dtype)


class LLAMARotaryEmbedding(RotaryEmbedding):
    """Rotary tables of a config, its frequency scaling included."""

    def __init__(self, config: Mapping | PretrainedConfig):
        config = text_config(config)
        super().__init__(config.head_dim, dict(config.rope_parameters))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor) -> KeyValue:
        """(cos, sin) of positions [B, T], each [B, T, D] in x's dtype."""
        halves = super().forward(position_ids.long())
        cos, sin = (torch.cat([half, half], -1).to(x.dtype) for half in halves)
        return cos, sin


# ---- masks


def scores_mask(
    mask: torch.Tensor | None, queries: tuple[int, int, int], past: int
) -> torch.Tensor | None:
    """What a block adds to its scores for a mask, [1 or B, 1 or heads, T, past + T]; None where
    that is causality alone, which the operator has. `queries` are B, heads and T.

    Raises:
        TypeError: no tensor.
        ValueError: neither [T, past + T] or [T, T], nonzero where a key comes later and nowhere
            else; nor floats of four dimensions, zero where a key is visible and else below.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"mask must be a torch.Tensor or None, got {type(mask).__name__}")
    tokens = queries[2]
    keys = past + tokens
    causal = torch.ones(tokens, keys, dtype=torch.bool, device=mask.device).tril(past)
    if mask.dim() == 4 and mask.is_floating_point():
        fits = all(mask.shape[axis] in (1, queries[axis]) for axis in range(3))
        if not fits or mask.shape[3] < keys or not bool((mask <= 0).all()):
            wanted = f"{list(queries)} or ones in their place, and at least {keys}; 0 or below"
            raise ValueError(f"mask must be {wanted}, got {list(mask.shape)}")
        return mask[..., :keys].masked_fill(~causal, -torch.inf)
    causal = causal if mask.shape[-1:] == (keys,) else causal[:, past:]
    if mask.shape[-2:] != causal.shape or not bool(((mask == 0) == causal).all()):
        raise ValueError(
            "mask must hide later tokens and nothing else, as torch.triu(ones, 1) does, or be "
            "floats of four dimensions to add to the scores"
        )
    return None
