"""Grouped-query attention of older scripts: the package's, under their names, with both families'
arguments.
"""

import torch
from torch import nn
from transformers import Cache

from mllama.config.checks import check_size
from mllama.dropin._arguments import by_construction, either, made_in
from mllama.dropin._masks import added_mask, causal_mask, hidden_mask, key_mask
from mllama.dropin._names import older_names
from mllama.dropin._rope import LLAMARotaryEmbedding, half_tables
from mllama.dropin._text_config import text_config
from mllama.hf.cache import check_cache
from mllama.hf.configs import MllamaTextConfig
from mllama.nn.attention import CausalAttention
from mllama.text.decoder import check_mask, count_positions, split_mask

KeyValue = tuple[torch.Tensor, torch.Tensor]


def repeat_kv(hidden_states: torch.Tensor, n_rep: int) -> torch.Tensor:
    """[B, key-value heads, T, head_dim] -> every head `n_rep` times, side by side."""
    return hidden_states if n_rep == 1 else hidden_states.repeat_interleave(n_rep, 1)


class LayerCache:
    """One layer's (k, v), as family B hands them from call to call, with what attention asks of a
    cache.

    Args:
        past_kv: (k, v), each [batch, groups, past, head_dim], or [batch, heads, past, head_dim]
            with every group repeated; or None.
        attention: whose they are.
        batch: rows of the tokens to come.

    Raises:
        TypeError: no pair of tensors.
        ValueError: another shape, or heads of one group that differ.
    """

    def __init__(self, past_kv: KeyValue | None, attention: "GroupQueryAttention", batch: int):
        self.pair = (
            None
            if past_kv is None
            else tuple(_groups(tensor, attention, batch) for tensor in _pair(past_kv))
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0 if self.pair is None else self.pair[0].shape[2]

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int
    ) -> KeyValue:
        new = key_states, value_states
        self.pair = (
            new
            if self.pair is None
            else tuple(torch.cat(both, 2) for both in zip(self.pair, new, strict=True))
        )
        return self.pair


def _pair(past_kv: KeyValue) -> KeyValue:
    if (
        not isinstance(past_kv, (tuple, list))
        or len(past_kv) != 2
        or not all(isinstance(tensor, torch.Tensor) for tensor in past_kv)
    ):
        raise TypeError(
            f"past_kv must be a pair of tensors (k, v) per layer, got {type(past_kv).__name__}"
        )
    k, v = past_kv
    if k.shape != v.shape:
        raise ValueError(
            f"past_kv: k and v must have one shape, got {list(k.shape)} and {list(v.shape)}"
        )
    return k, v


def _groups(tensor: torch.Tensor, attention: "GroupQueryAttention", batch: int) -> torch.Tensor:
    groups, heads, size = attention.num_kv_groups, attention.num_heads, attention.head_dim
    if (
        tensor.dim() != 4
        or tensor.shape[0] != batch
        or tensor.shape[1] not in (groups, heads)
        or tensor.shape[3] != size
    ):
        raise ValueError(
            f"past_kv: k and v must be [{batch}, {groups} (or {heads}), past, {size}], got {list(tensor.shape)}"
        )
    if tensor.shape[1] == groups:
        return tensor
    first = tensor[:, :: heads // groups]
    if not torch.equal(repeat_kv(first, heads // groups), tensor):
        raise ValueError(
            f"past_kv: of {heads} heads, those of one group must be equal; there are {groups} groups of keys and values"
        )
    return first


@older_names(q_proj="W_query", k_proj="W_key", v_proj="W_value", o_proj="out_proj")
class GroupQueryAttention(CausalAttention):
    """The package's attention with both families' constructors and calls.

    Attributes:
        d_out, num_heads, num_kv_groups, head_dim, group_size: sizes.
        W_query, W_key, W_value, out_proj: projections without biases.
        rotary_emb: of one built from a config; the other is given its tables.
    """

    def __init__(
        self,
        d_in: int | MllamaTextConfig | None = None,
        d_out: int | None = None,
        num_heads: int | torch.dtype | None = None,
        num_kv_groups: int | None = None,
        dtype: torch.dtype | None = None,
        *,
        config: MllamaTextConfig | None = None,
        layer_idx: int | None = None,
    ):
        """`GroupQueryAttention(d_in, d_out, num_heads, num_kv_groups, dtype=None)`, or `(config,
        layer_idx=None, dtype=None)`.

        Args:
            d_in, d_out: widths of the input and of the output.
            num_heads, num_kv_groups: query heads, and the key-value heads that they share.
            config: in their place, a LLAMA32Config.
            layer_idx: this layer's place in a `kv_cache`; None is 0.
            dtype: of the weights; None is torch's default.

        Raises:
            ValueError: sizes that do not go together.
        """
        if isinstance(d_in, MllamaTextConfig):
            config, layer_idx, dtype = (
                d_in,
                layer_idx if d_out is None else d_out,
                dtype if num_heads is None else num_heads,
            )
        if config is not None:
            config = text_config(config)
            d_in = d_out = config.hidden_size
            num_heads, num_kv_groups = config.num_attention_heads, config.num_key_value_heads
        for name, size in (
            ("d_in", d_in),
            ("d_out", d_out),
            ("num_heads", num_heads),
            ("num_kv_groups", num_kv_groups),
        ):
            check_size("GroupQueryAttention", name, size)
        if d_out % num_heads or num_heads % num_kv_groups or d_out // num_heads % 2:
            raise ValueError(
                "GroupQueryAttention: d_out must be an even number times num_heads, and num_heads a multiple of num_kv_groups; "
                f"got {d_out}, {num_heads} and {num_kv_groups}"
            )
        with made_in(dtype):
            super().__init__(d_in, num_heads, num_kv_groups, d_out // num_heads, layer_idx or 0)
            if d_in != d_out:
                self.o_proj = nn.Linear(d_out, d_out, bias=False)
        self.from_config = config is not None
        self.d_out, self.num_heads, self.num_kv_groups, self.group_size = (
            d_out,
            num_heads,
            num_kv_groups,
            num_heads // num_kv_groups,
        )
        if self.from_config:
            self.config = config
            self.rotary_emb = LLAMARotaryEmbedding(config)

    @by_construction(
        sizes="x cos sin mask past_kv use_cache",
        config="hidden_states attention_mask position_ids kv_cache",
    )
    def forward(
        self,
        *,
        x: torch.Tensor | None = None,
        hidden_states: torch.Tensor | None = None,
        positions: tuple[torch.Tensor, torch.Tensor] | None = None,
        use_cache: bool = False,
        **older,
    ) -> torch.Tensor | tuple[torch.Tensor, KeyValue]:
        """
        Args:
            x, hidden_states: [B, T, d_in]; two names.
            cos, sin: [positions, head_dim], all of them, of which those after the past are taken.
            mask: bool [T, past + T] or [B, heads, T, past + T], True where a key is hidden; None
                hides what comes later. 0 and 1, and floats to be added to the scores, are
                understood too.
            past_kv: (k, v) of the tokens before, each [B, num_kv_groups, past, head_dim].
            use_cache: also return (k, v), of the past and these.
            attention_mask: [B, past + T], zero where padded, or numbers to be added to the scores,
                [B, 1 or heads, T, past + T or more].
            position_ids: [B, T]; None counts.
            kv_cache: a `KVCache`, which these tokens are written to.

        Returns:
            [B, T, d_out], or with `use_cache` (that, (k, v)).

        Raises:
            TypeError, ValueError: an argument that does not fit, by its name.
        """
        x = either("GroupQueryAttention", x=x, hidden_states=hidden_states)
        if positions is not None:  # as the package calls it
            return super().forward(x, positions=positions, **older)
        arguments = package_arguments(self, x, **older)
        attended, _ = super().forward(x, **arguments)
        return (attended, layer_pair(arguments["cache"], self.layer_idx)) if use_cache else attended


def package_arguments(
    attention: GroupQueryAttention,
    x: torch.Tensor,
    *,
    cos: torch.Tensor | None = None,
    sin: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
    past_kv: KeyValue | None = None,
    attention_mask: torch.Tensor | None = None,
    position_ids: torch.Tensor | None = None,
    kv_cache: Cache | None = None,
) -> dict:
    """What a call of either family comes to: the arguments of `CausalAttention.forward` beside x."""
    if not isinstance(x, torch.Tensor) or not x.is_floating_point() or x.dim() != 3:
        raise ValueError(
            f"x must be a floating tensor [batch, tokens, width], got {getattr(x, 'shape', type(x).__name__)}"
        )
    if past_kv is not None and kv_cache is not None:
        raise ValueError("give past_kv or kv_cache, not both")
    if mask is not None and attention_mask is not None:
        raise ValueError("give mask or attention_mask, not both")
    check_cache(kv_cache)
    cache = LayerCache(past_kv, attention, len(x)) if kv_cache is None else kv_cache
    batch, tokens, _ = x.shape
    past = int(cache.get_seq_length(attention.layer_idx))
    seen = None
    if mask is not None:
        seen = hidden_mask(mask, tokens, past)
    elif isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4:
        seen = _added_and_causal(attention_mask, tokens, past + tokens)
    else:
        check_mask(attention_mask)
    keys = whole = None
    if seen is not None:
        keys, whole = split_mask(key_mask(seen, batch, attention.num_heads, tokens))
    elif attention_mask is not None:
        keys = attention_mask != 0
    if cos is not None or sin is not None:
        positions = half_tables(cos, sin, tokens, attention.head_dim, past)
    elif attention.from_config:
        if position_ids is None:
            position_ids = count_positions(keys, tokens, past, x.device)
        positions = attention.rotary_emb.tables(position_ids)
    else:
        raise TypeError("GroupQueryAttention: cos and sin are needed where it was built from sizes")
    return {
        "positions": positions,
        "cache": cache,
        "key_mask": keys,
        "attn_mask": whole,
        "query_offset": past,
    }


def layer_pair(cache: LayerCache | Cache, layer_idx: int) -> KeyValue:
    """(k, v) that a layer has in a cache."""
    return (
        cache.pair
        if isinstance(cache, LayerCache)
        else (cache.layers[layer_idx].keys, cache.layers[layer_idx].values)
    )


def _added_and_causal(mask: torch.Tensor, queries: int, keys: int) -> torch.Tensor:
    """A 4-D mask of family A, which may be longer than the keys: what it hides, and what comes
    later.
    """
    if not mask.is_floating_point():
        raise TypeError(
            f"attention_mask of 4 dimensions must be floats to be added to the scores, got {mask.dtype}"
        )
    if mask.shape[2] not in (1, queries) or mask.shape[3] < keys:
        raise ValueError(
            f"attention_mask must be [batch, 1 or heads, {queries}, at least {keys}], got {list(mask.shape)}"
        )
    seen, causal = added_mask(mask[..., :keys]), causal_mask(queries, keys, mask.device)
    return seen & causal if seen.dtype == torch.bool else seen.masked_fill(~causal, -torch.inf)
