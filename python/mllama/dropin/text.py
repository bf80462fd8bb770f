"""A Llama on the package's operators whose parameters have the older names.

`trf_blocks.0.att.W_query` and so on. What is unusual here: every class is built from a plain dict
(or sizes), and then takes `cos`, `sin` and `past_kv`; or from a config, and then takes
`position_ids` and `kv_cache`. `forward` is the one of the two that fits.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from mllama import ops
from mllama.dropin.config import text_config
from mllama.dropin.layers import (
    KeyValue,
    LLAMARotaryEmbedding,
    RMSNorm,
    compute_rope_params,
    half_tables,
    made_in,
    num_cached,
    split_mask,
    visible_keys,
)
from mllama.hf.names import Cache, PretrainedConfig

Config = Mapping[str, Any] | PretrainedConfig


class GroupQueryAttention(nn.Module):
    """`GroupQueryAttention(d_in, d_out, num_heads, num_kv_groups, dtype=None)`, called as
    `by_sizes`; or `GroupQueryAttention(config, layer_idx=None, dtype=None)`, called as `by_config`.

    Attributes: d_out, num_heads, num_kv_groups, head_dim, group_size. ValueError: sizes that do not
    fit each other.
    """

    def __init__(
        self,
        d_in=None,
        d_out=None,
        num_heads=None,
        num_kv_groups=None,
        dtype=None,
        *,
        config: PretrainedConfig | None = None,
        layer_idx: int | None = None,
    ):
        super().__init__()
        self.config, d_in = None, d_in if config is None else config
        if isinstance(d_in, PretrainedConfig):
            self.config, layer_idx = text_config(d_in), d_out if layer_idx is None else layer_idx
            dtype = num_heads if dtype is None else dtype
            d_in = d_out = self.config.hidden_size
            num_heads = self.config.num_attention_heads
            num_kv_groups = self.config.num_key_value_heads
            self.rotary_emb = LLAMARotaryEmbedding(self.config)
        sizes = (d_in, d_out, num_heads, num_kv_groups)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError(f"d_in, d_out, num_heads, num_kv_groups must be above 0, got {sizes}")
        if d_out % num_heads or num_heads % num_kv_groups or d_out // num_heads % 2:
            raise ValueError(
                "d_out must be an even multiple of num_heads, and num_heads a multiple of "
                f"num_kv_groups; got {d_out}, {num_heads} and {num_kv_groups}"
            )
        self.d_out, self.num_heads, self.num_kv_groups = d_out, num_heads, num_kv_groups
        self.head_dim, self.group_size = d_out // num_heads, num_heads // num_kv_groups
        self.layer_idx = layer_idx or 0
        with made_in(dtype):
            self.W_query = nn.Linear(d_in, d_out, bias=False)
            self.W_key = nn.Linear(d_in, num_kv_groups * self.head_dim, bias=False)
            self.W_value = nn.Linear(d_in, num_kv_groups * self.head_dim, bias=False)
            self.out_proj = nn.Linear(d_out, d_out, bias=False)

    def forward(self, *args, **kwargs):
        """`by_sizes` or `by_config`, as the module was built."""
        return (self.by_sizes if self.config is None else self.by_config)(*args, **kwargs)

    def by_sizes(self, x, cos, sin, mask=None, past_kv=None, use_cache=False):
        """x [B, T, d_in] -> [B, T, d_out]; with use_cache (that, (k, v) of the past and x).

        Args:
            cos, sin: [positions, D], from position 0; those of the past are skipped.
            mask: bool [T, past + T] or [B, heads, T, past + T], True where a key is hidden; 0 and
                1, and floats to add to the scores, work too. None: causal.
            past_kv: (k, v) of earlier tokens, each [B, num_kv_groups, past, D].
        """
        past = () if past_kv is None else self._checked(past_kv, len(x))
        num_past = past[0].shape[2] if past else 0
        q, k, v = self._project(x)
        tables = half_tables(cos, sin, x.shape[1], self.head_dim, num_past)
        q, k = ops.rope(q, k, *tables)
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, KV, T, D)
        if past:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        context = self._attend(q, k, v, visible_keys(mask, x.shape[1], num_past))
        return (context, (k, v)) if use_cache else context

    def by_config(self, hidden_states, attention_mask=None, position_ids=None, kv_cache=None):
        """hidden_states [B, T, hidden] -> the same shape.

        Args:
            attention_mask: [B, past + T], zero where padded; or floats to add to the scores, [B or
                1, heads or 1, T, at least past + T]. Causal with either.
            position_ids: [B, T]. None counts the tokens that are not padded.
            kv_cache: a `KVCache`, which the new keys and values are written to.
        """
        batch, tokens, _ = hidden_states.shape
        past = num_cached(kv_cache, self.layer_idx)
        key_mask, visible = split_mask(attention_mask, batch, tokens, past + tokens)
        if position_ids is None:
            position_ids = torch.arange(past, past + tokens, device=hidden_states.device)[None]
            if key_mask is not None:
                position_ids = (key_mask.cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        q, k, v = self._project(hidden_states)
        q, k = ops.rope(q, k, *self.rotary_emb.tables(position_ids))
        k, v = k.transpose(1, 2), v.transpose(1, 2)  # (B, KV, T, D)
        if kv_cache is not None:
            k, v = kv_cache.update(k, v, self.layer_idx)
            if k.shape[2] != past + tokens:
                raise ValueError("kv_cache must be a KVCache, which keeps all tokens and no more")
        return self._attend(q, k, v, visible, key_mask)

    def _project(self, x: torch.Tensor) -> list[torch.Tensor]:
        batch, tokens, _ = x.shape
        projections = (self.W_query, self.W_key, self.W_value)
        return [p(x).view(batch, tokens, -1, self.head_dim) for p in projections]  # (B, T, H, D)

    def _attend(self, q, k, v, visible, key_mask=None) -> torch.Tensor:
        """q [B, T, H, D] over k, v [B, KV, S, D] -> [B, T, d_out]."""
        if visible is None:
            k, v = k.transpose(1, 2), v.transpose(1, 2)
            out = ops.attention(q, k, v, causal=True, key_mask=key_mask)
        else:
            visible = visible if visible.dtype == torch.bool else visible.to(q.dtype)
            out = scaled_dot_product_attention(
                q.transpose(1, 2), k, v, attn_mask=visible, enable_gqa=True
            ).transpose(1, 2)
        return self.out_proj(out.flatten(2))  # (B, T, H, D) -> (B, T, d_out)

    def _checked(self, past_kv: KeyValue, batch: int) -> KeyValue:
        if not isinstance(past_kv, Sequence) or len(past_kv) != 2:
            raise TypeError(f"past_kv must be a pair (k, v), got {type(past_kv).__name__}")
        shape = (batch, self.num_kv_groups, past_kv[0].shape[2], self.head_dim)
        if any(tensor.shape != shape for tensor in past_kv):
            found = [list(tensor.shape) for tensor in past_kv]
            raise ValueError(f"past_kv must be [batch, num_kv_groups, past, head_dim], got {found}")
        return past_kv


class FeedForward(nn.Module):
    """fc3(silu(fc1(x)) * fc2(x)), of a dict or a config."""

    def __init__(self, config: Config):
        super().__init__()
        config = text_config(config)
        with made_in(config.dtype):
            self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            self.fc2 = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
            self.fc3 = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> the same shape."""
        return self.fc3(ops.swiglu(self.fc1(x), self.fc2(x)))


class TransformerBlock(nn.Module):
    """x + att(norm1(x)), then + ff(norm2(...)); called as `by_dict` or `by_config`."""

    def __init__(self, config: Config, layer_idx: int = 0):
        super().__init__()
        self.from_config = not isinstance(config, Mapping)
        config = text_config(config)
        width, heads = config.hidden_size, config.num_attention_heads
        with made_in(config.dtype):
            if self.from_config:
                self.att = GroupQueryAttention(config, layer_idx)
            else:
                self.att = GroupQueryAttention(width, width, heads, config.num_key_value_heads)
            self.ff = FeedForward(config)
            self.norm1 = RMSNorm(width, config.rms_norm_eps)
            self.norm2 = RMSNorm(width, config.rms_norm_eps)

    def forward(self, *args, **kwargs):
        """`by_config` or `by_dict`, as the module was built."""
        return (self.by_config if self.from_config else self.by_dict)(*args, **kwargs)

    def by_dict(self, x, mask, cos, sin, past_kv=None, use_cache=False):
        """[B, T, hidden] -> the same shape, or (that, (k, v)); arguments as of `by_sizes`."""
        attended, pair = self.att(self.norm1(x), cos, sin, mask, past_kv, True)
        x = x + attended
        x = x + self.ff(self.norm2(x))
        return (x, pair) if use_cache else x

    def by_config(self, hidden_states, attention_mask=None, position_ids=None, kv_cache=None):
        """[B, T, hidden] -> the same shape; arguments as of `GroupQueryAttention.by_config`."""
        x = hidden_states
        x = x + self.att(self.norm1(x), attention_mask, position_ids, kv_cache)
        return x + self.ff(self.norm2(x))


class Llama3Model(nn.Module):
    """Of a dict: a decoder with `out_head`, which returns logits. Of a config: without a head, so
    that it returns normed hidden states. Called as `by_dict` or `by_config`.
    """

    def __init__(self, config: Config):
        super().__init__()
        self.cfg = config if isinstance(config, Mapping) else None
        self.config = text_config(config)
        width, vocabulary = self.config.hidden_size, self.config.vocab_size
        with made_in(self.config.dtype):
            self.tok_emb = nn.Embedding(vocabulary, width)
            blocks = range(self.config.num_hidden_layers)
            self.trf_blocks = nn.ModuleList(TransformerBlock(config, index) for index in blocks)
            self.final_norm = RMSNorm(width, self.config.rms_norm_eps)
            if self.cfg is not None:
                self.out_head = nn.Linear(width, vocabulary, bias=False)
        self._tables = None

    def get_input_embeddings(self) -> nn.Embedding:
        """`tok_emb`."""
        return self.tok_emb

    @property
    def cos(self) -> torch.Tensor:
        """float32 [context_length, D], as `sin`."""
        return self._rope_tables()[0]

    @property
    def sin(self) -> torch.Tensor:
        return self._rope_tables()[1]

    def _rope_tables(self) -> KeyValue:
        device, config = self.tok_emb.weight.device, self.config
        if self._tables is None or self._tables[0].device != device:
            sizes = (config.head_dim, config.rope_base, config.context_length, config.rope_freq)
            with device:
                self._tables = compute_rope_params(*sizes)
        return self._tables

    def forward(self, *args, **kwargs):
        """`by_config` or `by_dict`, as the model was built."""
        return (self.by_config if self.cfg is None else self.by_dict)(*args, **kwargs)

    def by_dict(self, in_idx: torch.Tensor, past_kv=None, use_cache: bool = False):
        """Logits [B, T, vocab_size] of ids [B, T]; with use_cache (logits, past_kv).

        `past_kv` has (k, v) of every layer, each [B, n_kv_groups, past, D]; it is not changed.

        Raises:
            ValueError: more tokens than context_length, or a past_kv that does not fit.
            IndexError: an id outside the vocabulary.
        """
        return self.forward_with_embeds(self.tok_emb(in_idx), past_kv, use_cache)

    def forward_with_embeds(self, inputs_embeds, past_kv=None, use_cache: bool = False):
        """`by_dict` of embeddings [B, T, hidden], cast to the weights' dtype."""
        if self.cfg is None:
            raise TypeError("forward_with_embeds is for a Llama3Model of a dict")
        layers = len(self.trf_blocks)
        past = [None] * layers if past_kv is None else past_kv
        if not isinstance(past, Sequence) or len(past) != layers:
            raise ValueError(f"past_kv must be a list of {layers} pairs (k, v)")
        lengths = {0 if pair is None else pair[0].shape[2] for pair in past}
        if len(lengths) > 1:
            raise ValueError(f"past_kv must be as long in every layer, got {sorted(lengths)}")
        x = self._checked(inputs_embeds, lengths.pop())
        cos, sin = self._rope_tables()
        pairs = []
        for block, pair in zip(self.trf_blocks, past, strict=True):
            x, pair = block(x, None, cos, sin, pair, True)
            pairs.append(pair)
        logits = self.out_head(self.final_norm(x))
        return (logits, pairs) if use_cache else logits

    def by_config(
        self,
        input_ids: torch.Tensor | None = None,
        input_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        kv_cache: Cache | None = None,
    ) -> torch.Tensor:
        """Normed hidden states [B, T, hidden] of input_embeds [B, T, hidden], or else input_ids.

        Other arguments as of `GroupQueryAttention.by_config`; raises as `by_dict`.
        """
        if input_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or input_embeds")
            input_embeds = self.tok_emb(input_ids)
        x = self._checked(input_embeds, num_cached(kv_cache))
        for block in self.trf_blocks:
            x = block(x, attention_mask, position_ids, kv_cache)
        return self.final_norm(x)

    def _checked(self, embeds: torch.Tensor, past: int) -> torch.Tensor:
        tokens, longest = past + embeds.shape[1], self.config.context_length
        if tokens > longest:
            raise ValueError(f"{tokens} tokens are more than context_length, {longest}")
        return embeds.to(self.tok_emb.weight.dtype)


class Llama3ForCausalLM(nn.Module):
    """A `Llama3Model` of a config, `model`, and its head, `lm_head`."""

    def __init__(self, config: PretrainedConfig):
        super().__init__()
        if isinstance(config, Mapping):
            raise TypeError("config must be a LLAMA32Config; Llama3Model takes a dict")
        self.config, self.vocab_size = config, config.vocab_size
        self.model = Llama3Model(config)
        with made_in(config.dtype):
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.tie_weights()

    def tie_weights(self) -> None:
        """Make the head the embedding matrix."""
        self.lm_head.weight = self.model.tok_emb.weight

    def forward(
        self,
        input_ids=None,
        input_embeds=None,
        attention_mask=None,
        position_ids=None,
        kv_cache=None,
    ) -> tuple[torch.Tensor, Cache | None]:
        """(logits [B, T, vocab_size], kv_cache); arguments as of `Llama3Model.by_config`."""
        states = self.model(input_ids, input_embeds, attention_mask, position_ids, kv_cache)
        return self.lm_head(states), kv_cache
