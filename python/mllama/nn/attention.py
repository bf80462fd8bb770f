"""Attention blocks: projections around the attention operator, on tensors laid out [batch, length,
heads, head size].
"""

import torch
from torch import nn

from mllama.nn.cache import Cache
from mllama.ops.attention import attention, attention_weights
from mllama.ops.rope import rope


def split_heads(x: torch.Tensor, head_dim: int) -> torch.Tensor:
    """[..., heads * head_dim] -> [..., heads, head_dim]; how many heads there are is told by x,
    which may be empty.
    """
    return x.view(*x.shape[:-1], x.shape[-1] // head_dim, head_dim)


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, attn_mask: torch.Tensor
) -> torch.Tensor:
    """softmax(q k' * D**-0.5 + attn_mask) v, by torch's attention: for masks that the operator's
    numbers cannot tell.

    Args:
        q: [B, T, H, D]; k, v: [B, S, KV, D], of the same dtype.
        attn_mask: [B or 1, H or 1, T or 1, S]: bool, True where a key is seen, or floats that are
            added to the scores.

    Returns:
        [B, T, H, D]; zeros for a query to which every key is False or -inf.
    """
    if attn_mask.dtype not in (torch.bool, torch.float32, q.dtype):
        attn_mask = attn_mask.float()
    q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
    return nn.functional.scaled_dot_product_attention(
        q, k, v, attn_mask=attn_mask, enable_gqa=q.shape[1] != k.shape[1]
    ).transpose(1, 2)


def masked_attention_weights(
    q: torch.Tensor, k: torch.Tensor, attn_mask: torch.Tensor
) -> torch.Tensor:
    """The probabilities that `masked_attention` weighs v with: [B, H, T, S] float32."""
    batch, keys, kv_heads, _ = k.shape
    every = torch.eye(keys, dtype=torch.float32, device=k.device)[None, :, None].expand(
        batch, -1, kv_heads, -1
    )  # (B, S, KV, S)
    return masked_attention(q.float(), k.float(), every, attn_mask).transpose(1, 2)


class BidirectionalAttention(nn.Module):
    """Every position sees every other, or all of a context; projections with biases, no positions
    of its own.

    Args:
        hidden_size: width of the input and of the output.
        heads: how many heads it is shared out to.
        dropout: chance that training leaves out a probability. Above 0 training lays out the [B,
            heads, T, S] probabilities in memory.
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
        """x: [B, T, hidden_size], context: [B, S, hidden_size], by default x -> (x's shape,
        probabilities [B, heads, T, S] or None).
        """
        context = x if context is None else context
        q, k, v = (
            split_heads(projection(source), self.head_dim)
            for projection, source in (
                (self.q_proj, x),
                (self.k_proj, context),
                (self.v_proj, context),
            )
        )
        dropping = self.training and self.dropout > 0
        weights = attention_weights(q, k) if output_attentions or dropping else None
        if dropping:
            kept = nn.functional.dropout(weights, self.dropout).to(v.dtype)
            attended = torch.einsum("bhts,bshd->bthd", kept, v)
        else:
            attended = attention(q, k, v)
        return self.out_proj(attended.flatten(2)), weights


class CausalAttention(nn.Module):
    """Grouped-query attention with rotary positions, a key-value cache, and padding on either side.

    Args:
        hidden_size: width of the input and of the output.
        heads, kv_heads: query heads, and the key-value heads they share.
        head_dim: size of a head.
        layer_idx: this layer's place in the cache.
        bias: whether the four projections have biases.
    """

    def __init__(
        self,
        hidden_size: int,
        heads: int,
        kv_heads: int,
        head_dim: int,
        layer_idx: int,
        bias: bool = False,
    ):
        super().__init__()
        self.head_dim = head_dim
        self.layer_idx = layer_idx
        self.q_proj = nn.Linear(hidden_size, heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(heads * head_dim, hidden_size, bias=bias)

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
            cache: cache that the new keys and values are written to and all S of them read from.
            key_mask: bool [B, S], False where a key is padding.
            query_offset: position of x's first row among the keys,
            prefix_length: keys at the front that every row sees, and
            first_key: where each position's sequence begins, all as the attention operator takes
                them.
            attn_mask: in place of all these, and of causality: as `masked_attention` takes it.
            output_attentions: also return the probabilities.

        Returns:
            ([B, T, hidden_size], probabilities [B, heads, T, S] float32 or None)
        """
        q, k, v = (
            split_heads(projection(x), self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rope(q, k, *positions)
        if cache is not None:
            k, v = cache.update(self.layer_idx, k, v)  # (B, S, KV, D)
        if attn_mask is not None:
            weights = masked_attention_weights(q, k, attn_mask) if output_attentions else None
            return self.o_proj(masked_attention(q, k, v, attn_mask).flatten(2)), weights
        masks = {
            "query_offset": query_offset,
            "key_mask": key_mask,
            "prefix_length": prefix_length,
            "first_key": first_key,
        }
        weights = attention_weights(q, k, causal=True, **masks) if output_attentions else None
        return self.o_proj(attention(q, k, v, causal=True, **masks).flatten(2)), weights
