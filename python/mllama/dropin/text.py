"""A Llama on the package's operators whose parameters have the older names.

`trf_blocks.0.att.W_query` and so on. Blocks take `mask`, `cos`, `sin` and `past_kv`. A model of a
plain dict takes `past_kv` and returns logits; one of a config takes `attention_mask`,
`position_ids` and `kv_cache`.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mllama import ops
from mllama.dropin.config import text_config
from mllama.dropin.layers import (
    KeyValue,
    KVCache,
    LLAMARotaryEmbedding,
    RMSNorm,
    made_in,
    num_cached,
    rope,
    scores_mask,
)
from mllama.hf.names import PretrainedConfig
from mllama.nn.attention import masked_attention, split_heads

Config = Mapping[str, Any] | PretrainedConfig


class GroupQueryAttention(nn.Module):
    """Causal attention whose query heads share `num_kv_groups` heads of keys and values.

    Attributes: d_out, num_heads, num_kv_groups, head_dim, group_size.

    Raises:
        ValueError: sizes that do not fit each other.
    """

    def __init__(self, d_in, d_out=None, num_heads=None, num_kv_groups=None, dtype=None):
        super().__init__()
        sizes = (d_in, d_out, num_heads, num_kv_groups)
        if not all(isinstance(size, int) and size > 0 for size in sizes):
            raise ValueError("d_in, d_out, num_heads, num_kv_groups must be integers above 0")
        if d_out % num_heads or num_heads % num_kv_groups or d_out // num_heads % 2:
            raise ValueError(
                "d_out must be an even multiple of num_heads, and num_heads a multiple of "
                f"num_kv_groups; got {d_out}, {num_heads} and {num_kv_groups}"
            )
        self.d_out, self.num_heads, self.num_kv_groups = d_out, num_heads, num_kv_groups
        self.head_dim, self.group_size = d_out // num_heads, num_heads // num_kv_groups
        with made_in(dtype):
            self.W_query = nn.Linear(d_in, d_out, bias=False)
            self.W_key = nn.Linear(d_in, num_kv_groups * self.head_dim, bias=False)
            self.W_value = nn.Linear(d_in, num_kv_groups * self.head_dim, bias=False)
            self.out_proj = nn.Linear(d_out, d_out, bias=False)

    def forward(self, x, cos, sin, mask=None, past_kv=None, use_cache=False):
        """x [B, T, d_in] -> [B, T, d_out]; with use_cache (that, (k, v) of the past and x).

        Args:
            cos, sin: [positions, D], from position 0, those of the past are skipped; or of these
                tokens alone, [T, D] or [B, 1, T, D].
            mask: None, or [T, past + T] or [T, T], nonzero where a key comes later; or floats to
                add to the scores, [B or 1, heads or 1, T, past + T]. Causal with any.
            past_kv: (k, v) of earlier tokens, each [B, num_kv_groups, past, D].
        """
        past, tokens = 0 if past_kv is None else past_kv[0].shape[2], x.shape[1]
        shape = (len(x), self.num_kv_groups, past, self.head_dim)
        if past_kv is not None and [tensor.shape for tensor in past_kv] != [shape, shape]:
            raise ValueError(f"past_kv must be two tensors {list(shape)}, keys and values")
        added = scores_mask(mask, (len(x), self.num_heads, tokens), past)
        if cos.shape[-2] >= past + tokens:
            cos, sin = cos[..., past:, :], sin[..., past:, :]
        q, k, v = (
            split_heads(projection(x), self.head_dim).transpose(1, 2)  # (B, heads, T, D)
            for projection in (self.W_query, self.W_key, self.W_value)
        )
        q, k = rope(q, cos, sin), rope(k, cos, sin)
        if past:
            k, v = torch.cat([past_kv[0], k], 2), torch.cat([past_kv[1], v], 2)
        states = [tensor.transpose(1, 2) for tensor in (q, k, v)]  # (B, T or past + T, heads, D)
        if added is None:
            context = ops.attention(*states, causal=True)
        else:
            context = masked_attention(*states, added)
        context = self.out_proj(context.flatten(2))  # (B, T, H, D) -> (B, T, d_out)
        return (context, (k, v)) if use_cache else context


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
    """x + att(norm1(x)), then + ff(norm2(...)), of a dict or a config."""

    def __init__(self, config: Config):
        super().__init__()
        config = text_config(config)
        width, heads = config.hidden_size, config.num_attention_heads
        with made_in(config.dtype):
            self.att = GroupQueryAttention(width, width, heads, config.num_key_value_heads)
            self.ff = FeedForward(config)
            self.norm1 = RMSNorm(width, config.rms_norm_eps)
            self.norm2 = RMSNorm(width, config.rms_norm_eps)

    def forward(self, x, mask, cos, sin, past_kv=None, use_cache=False):
        """[B, T, hidden] -> the same shape, or (that, (k, v)); as `GroupQueryAttention`'s."""
        attended, pair = self.att(self.norm1(x), cos, sin, mask, past_kv, True)
        x = x + attended
        x = x + self.ff(self.norm2(x))
        return (x, pair) if use_cache else x


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
            self.trf_blocks = nn.ModuleList(TransformerBlock(config) for _ in blocks)
            self.final_norm = RMSNorm(width, self.config.rms_norm_eps)
            if self.cfg is not None:
                self.out_head = nn.Linear(width, vocabulary, bias=False)
        self.rotary_emb = LLAMARotaryEmbedding(self.config)

    def get_input_embeddings(self) -> nn.Embedding:
        """`tok_emb`."""
        return self.tok_emb

    @property
    def cos(self) -> torch.Tensor:
        """float32 [context_length, D], as `sin`."""
        return self._tables(self.config.max_position_embeddings)[0]

    @property
    def sin(self) -> torch.Tensor:
        return self._tables(self.config.max_position_embeddings)[1]

    def _tables(self, length: int) -> KeyValue:
        positions = torch.arange(length, device=self.tok_emb.weight.device)
        cos, sin = self.rotary_emb(positions.float(), positions[None])
        return cos[0], sin[0]

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
        num_past, pairs = lengths.pop(), []
        x = self._checked(inputs_embeds, num_past)
        cos, sin = self._tables(num_past + x.shape[1])
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
        kv_cache: KVCache | None = None,
    ) -> torch.Tensor:
        """Normed hidden states [B, T, hidden] of input_embeds [B, T, hidden], or else input_ids.

        Args:
            attention_mask: [B, past + T], zero where padded; or floats to add to the scores, [B or
                1, heads or 1, T, at least past + T]. Causal with either.
            position_ids: [B, T]. None counts the tokens that are not padded.
            kv_cache: a `KVCache`, which the new keys and values are written to.

        Raises:
            TypeError: no cache. ValueError: neither ids nor embeddings; else as `by_dict`.
        """
        if input_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or input_embeds")
            input_embeds = self.tok_emb(input_ids)
        past = num_cached(kv_cache)
        x, mask = self._checked(input_embeds, past), attention_mask
        batch, tokens, _ = x.shape
        positions = torch.arange(past, past + tokens, device=x.device)[None]
        if isinstance(mask, torch.Tensor) and mask.dim() == 2:
            if mask.shape != (batch, past + tokens):
                wanted = [batch, past + tokens]
                raise ValueError(f"attention_mask must be {wanted}, got {list(mask.shape)}")
            positions = ((mask != 0).cumsum(-1) - 1).clamp(min=0)[:, past:]
            hidden = (mask == 0)[:, None, None]  # (B, 1, 1, past + T)
            added = torch.zeros(hidden.shape, device=x.device).masked_fill(hidden, -torch.inf)
            mask = added if bool(hidden.any()) else None
        positions = positions if position_ids is None else position_ids
        cos, sin = self.rotary_emb(positions.float(), positions)
        cos, sin = cos[:, None], sin[:, None]  # (B or 1, 1, T, D)
        for index, block in enumerate(self.trf_blocks):
            pair = kv_cache.pair(index) if past else None
            x, (k, v) = block(x, mask, cos, sin, pair, True)
            if kv_cache is not None:
                kv_cache.update(k[:, :, past:], v[:, :, past:], index)
        return self.final_norm(x)

    def _checked(self, embeds: torch.Tensor, past: int) -> torch.Tensor:
        if embeds.dim() != 3:
            raise ValueError(
                "ids must be [batch, tokens] and embeddings [batch, tokens, hidden], got "
                f"{list(embeds.shape[:-1])} of width {embeds.shape[-1]}"
            )
        tokens, longest = past + embeds.shape[1], self.config.max_position_embeddings
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
    ) -> tuple[torch.Tensor, KVCache | None]:
        """(logits [B, T, vocab_size], kv_cache); arguments as of `Llama3Model.by_config`."""
        states = self.model(input_ids, input_embeds, attention_mask, position_ids, kv_cache)
        return self.lm_head(states), kv_cache
