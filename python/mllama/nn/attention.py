"""Attention layers: projections around the attention operator, on tensors [B, T, heads, D]."""

from collections.abc import Callable

import torch
from torch import nn

from mllama.nn.adapted import linears
from mllama.nn.cache import Cache
from mllama.ops.attention import attention, attention_weights
from mllama.ops.rope import rope


def split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[..., heads * head_dim] -> [..., heads, head_dim]; x may be empty."""
    return x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)


def masked_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    attn_mask: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention with a mask that the operator's arguments cannot express.

    Args:
        q: [B, T, H, D]; k, v: [B, S, KV, D], of the same dtype.
        attn_mask: [B or 1, H or 1, T or 1, S]: bool, True where a key is visible, or floats that
            are added to the scores.
        scale, softcap: as for the attention operator.

    Returns:
        [B, T, H, D]; zeros for a query without visible keys.
    """
    if softcap is not None:  # scaled_dot_product_attention has none
        weights = masked_attention_weights(q, k, attn_mask, scale, softcap)
        groups = weights.to(v.dtype).unflatten(1, (v.shape[2], -1))  # (B, KV, G, T, S)
        return torch.einsum("bkgts,bskd->btkgd", groups, v).flatten(2, 3)
    if attn_mask.dtype not in (torch.bool, torch.float32, q.dtype):
        attn_mask = attn_mask.float()
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (B, heads, length, D)
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)


def masked_attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    attn_mask: torch.Tensor,
    scale: float | None = None,
    softcap: float | None = None,
) -> torch.Tensor:
    """The probabilities in `masked_attention`: [B, H, T, S] float32."""
    groups = q.float().unflatten(2, (k.shape[2], -1))  # (B, T, KV, G, D)
    scores = torch.einsum("btkgd,bskd->bkgts", groups, k.float()).flatten(1, 2)  # (B, H, T, S)
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if attn_mask.dtype == torch.bool:
        hidden = ~attn_mask
    else:
        scores = scores + attn_mask.float()
        hidden = scores == -torch.inf
    # A finite fill value, zeroed afterwards: a query without visible keys gives zeros, not NaN.
    scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    return scores.softmax(-1).masked_fill(hidden, 0)


class BidirectionalAttention(nn.Module):
    """Attention over all positions, or over a context. Projections have biases; no positions.

    Args:
        hidden_size: width of input and output.
        heads: number of heads.
        dropout: dropout of the probabilities in training. Above 0, training materializes them,
            [B, heads, T, S].
    """

    def __init__(self, hidden_size: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.head_dim = hidden_size // heads
        self.dropout = dropout
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(
        self, x: torch.Tensor, output_attentions: bool = False, context: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x: [B, T, hidden_size]; context: [B, S, hidden_size]. Default: x.

        Returns:
            ([B, T, hidden_size], probabilities [B, heads, T, S] float32 or None)
        """
        q, k, v = (split_heads(part, self.head_dim) for part in self._project(x, context))
        dropping = self.training and self.dropout > 0
        weights = attention_weights(q, k) if output_attentions or dropping else None
        if dropping:
            dropped = nn.functional.dropout(weights, self.dropout).to(v.dtype)
            attended = torch.einsum("bhts,bshd->bthd", dropped, v)
        else:
            attended = attention(q, k, v)
        return self.out_proj(attended.flatten(2)), weights

    def _project(self, x: torch.Tensor, context: torch.Tensor | None) -> list[torch.Tensor]:
        if context is None:
            return linears(x, self.q_proj, self.k_proj, self.v_proj)
        return [self.q_proj(x), *linears(context, self.k_proj, self.v_proj)]


class CausalAttention(nn.Module):
    """Grouped-query attention with rotary positions, a key-value cache, and padding on either side.

    Args:
        hidden_size: width of input and output.
        heads, kv_heads: number of query heads and of key-value heads.
        head_dim: size of a head.
        layer_idx: index of this layer in the cache.
        bias: whether the four projections have biases.
        window, scale, softcap: as for the attention operator.
        make_norm: builds the norm of q's and k's heads from their size. Default: none.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        layer_idx: int,
        bias: bool = False,
        *,
        window: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        make_norm: Callable[[int], nn.Module] | None = None,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.layer_idx = layer_idx
        self.window = window
        self.scale = scale
        self.softcap = softcap
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=bias)
        self.has_qk_norm = make_norm is not None
        if make_norm is not None:
            self.q_norm, self.k_norm = make_norm(head_dim), make_norm(head_dim)

    def forward(
        self,
        x: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None = None,
        key_mask: torch.Tensor | None = None,
        query_offset: int | torch.Tensor | None = None,
        prefix_length: torch.Tensor | None = None,
        first_key: torch.Tensor | None = None,
        attn_mask: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            x: [B, T, hidden_size].
            positions: rotary tables of the T positions.
            cache: cache that the new keys and values are appended to; all S are read.
            key_mask: bool [B, S], False where a key is padding.
            query_offset: position of x's first row among the keys.
            prefix_length: number of leading keys that attend to each other in both directions.
            first_key: start of each position's sequence. These three are the attention operator's.
            attn_mask: replaces all these, causality and window; as in `masked_attention`.
            output_attentions: also return the probabilities.

        Returns:
            ([B, T, hidden_size], probabilities [B, heads, T, S] float32 or None)
        """
        q, k, v = (
            split_heads(part, self.head_dim)  # (B, T, heads, D)
            for part in linears(x, self.q_proj, self.k_proj, self.v_proj)
        )
        if self.has_qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rope(q, k, *positions)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)  # (B, S, KV, D)
        scores = {"scale": self.scale, "softcap": self.softcap}
        if attn_mask is not None:
            attended = masked_attention(q, k, v, attn_mask, **scores)
            weights = (
                masked_attention_weights(q, k, attn_mask, **scores) if output_attentions else None
            )
            return self.o_proj(attended.flatten(2)), weights
        options = scores | {
            "causal": True,
            "window": self.window,
            "query_offset": query_offset,
            "key_mask": key_mask,
            "prefix_length": prefix_length,
            "first_key": first_key,
        }
        weights = attention_weights(q, k, **options) if output_attentions else None
        return self.o_proj(attention(q, k, v, **options).flatten(2)), weights
