"""The decoder of older scripts: the package's, under their names, with both families' constructors
and calls.
"""

from collections.abc import Mapping

import torch
from torch import nn
from transformers import Cache

from mllama.dropin._arguments import by_construction, either, made_in
from mllama.dropin._attention import (
    GroupQueryAttention,
    KeyValue,
    LayerCache,
    layer_pair,
    package_arguments,
)
from mllama.dropin._cache import KVCache
from mllama.dropin._names import older_names
from mllama.dropin._rope import compute_rope_params, whole
from mllama.dropin._text_config import DictConfig, text_config
from mllama.hf.cache import check_cache, past_length
from mllama.hf.configs import MllamaTextConfig
from mllama.model.inputs import check_ids, check_range
from mllama.nn import norm
from mllama.nn.mlp import GatedMLP
from mllama.text.decoder import Decoder, DecoderLayer, check_embeddings

Config = MllamaTextConfig | Mapping


class RMSNorm(norm.RMSNorm):
    """Root-mean-square norm in Llama's order: statistics in float32, then the scale, which starts
    at 1.
    """

    def __init__(self, dim: int, eps: float = 1e-6):
        super().__init__(dim, eps)


LLAMARMSNorm = RMSNorm


@older_names(gate_proj="fc1", up_proj="fc2", down_proj="fc3")
class FeedForward(GatedMLP):
    """fc3(silu(fc1(x)) * fc2(x)), of a config or a dict; [..., width] -> the same shape."""

    def __init__(self, config: Config | None = None, *, cfg: Config | None = None):
        config = text_config(either("FeedForward", config=config, cfg=cfg))
        with made_in(config.dtype):
            super().__init__(config.hidden_size, config.intermediate_size)


@older_names(self_attn="att", mlp="ff", input_layernorm="norm1", post_attention_layernorm="norm2")
class TransformerBlock(DecoderLayer):
    """The package's layer: x + att(norm1(x)), and to that its ff(norm2(...)).

    Args:
        config: a LLAMA32Config, or a dict as LLAMA32_CONFIG; also by the name `cfg`.
        layer_idx: this layer's place in a `kv_cache`.
    """

    def __init__(
        self, config: Config | None = None, layer_idx: int = 0, *, cfg: Config | None = None
    ):
        config = text_config(either("TransformerBlock", config=config, cfg=cfg))
        with made_in(config.dtype):
            super().__init__(config, layer_idx)
        self.from_config = not isinstance(config, DictConfig)

    @staticmethod
    def make_attention(config: MllamaTextConfig, layer_idx: int) -> GroupQueryAttention:
        if not isinstance(config, DictConfig):
            return GroupQueryAttention(config, layer_idx)
        width = config.hidden_size
        attention = GroupQueryAttention(
            width, width, config.num_attention_heads, config.num_key_value_heads
        )
        attention.layer_idx = layer_idx
        return attention

    @staticmethod
    def make_mlp(config: MllamaTextConfig) -> FeedForward:
        return FeedForward(config)

    @staticmethod
    def make_norm(config: MllamaTextConfig) -> RMSNorm:
        return RMSNorm(config.hidden_size, config.rms_norm_eps)

    @by_construction(
        sizes="x mask cos sin past_kv use_cache",
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
        """[B, T, width] -> the same shape, or with `use_cache` (that, (k, v)); arguments as
        `GroupQueryAttention.forward` names them.
        """
        x = either("TransformerBlock", x=x, hidden_states=hidden_states)
        if positions is not None:  # as the package calls it
            return super().forward(x, positions=positions, **older)
        arguments = package_arguments(self.att, x, **older)
        x, _ = super().forward(x, **arguments)
        return (x, layer_pair(arguments["cache"], self.att.layer_idx)) if use_cache else x


@older_names(embed_tokens="tok_emb", layers="trf_blocks", norm="final_norm")
class Llama3Model(Decoder):
    """The package's decoder. Of a dict: with an output head, `out_head`, so that it answers logits.
    Of a LLAMA32Config: without, so that it answers the normed hidden states.

    Args:
        config: a LLAMA32Config, or a dict as LLAMA32_CONFIG; also by the name `cfg`. Weights are
            made in its dtype.

    Attributes:
        cfg: the dict.
        cos, sin: float32 buffers of a model of a dict, [context_length, head_dim], for scripts that
            call its blocks themselves.
    """

    layer_class = TransformerBlock

    def __init__(self, config: Config | None = None, *, cfg: Config | None = None):
        given = either("Llama3Model", config=config, cfg=cfg)
        config = text_config(given)
        self.from_config = not isinstance(config, DictConfig)
        with made_in(config.dtype):
            super().__init__(config)
            if not self.from_config:
                self.out_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if not self.from_config:
            self.cfg = given
            self.make_tables()

    def make_tables(self) -> None:
        """Put `cos` and `sin` in place, on torch's default device."""
        sizes = (
            self.config.head_dim,
            self.config.rope_base,
            self.config.context_length,
            self.config.rope_freq,
        )
        for name, table in zip(("cos", "sin"), compute_rope_params(*sizes), strict=True):
            self.register_buffer(name, table, persistent=False)

    def _apply(self, fn, recurse: bool = True):
        """`model.to(bfloat16)` would round the tables, and leaving the meta device would empty
        them.
        """
        before = self._buffers.get("cos")
        super()._apply(fn, recurse)
        after = self._buffers.get("cos")
        if (
            after is not None
            and not after.is_meta
            and (after.dtype != torch.float32 or before.is_meta)
        ):
            with after.device:
                self.make_tables()
        return self

    def get_input_embeddings(self) -> nn.Embedding:
        """`tok_emb`."""
        return self.tok_emb

    @by_construction(
        sizes="in_idx past_kv use_cache",
        config="input_ids input_embeds attention_mask position_ids kv_cache",
    )
    def forward(
        self,
        *,
        in_idx: torch.Tensor | None = None,
        input_ids: torch.Tensor | None = None,
        input_embeds: torch.Tensor | None = None,
        past_kv: list[KeyValue] | None = None,
        use_cache: bool = False,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        kv_cache: Cache | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, list[KeyValue]]:
        """
        Args:
            in_idx, input_ids: int [B, T]; two names. Or
            input_embeds: [B, T, width] of any floating dtype, which comes before ids.
            past_kv: (k, v) of every layer, each [B, n_kv_groups, past, head_dim]; left as it is.
            use_cache: also return such a list, of the past and these tokens.
            attention_mask: [B, past + T], zero where padded, or numbers to be added to the scores,
                [B, 1 or heads, T, past + T or more].
            position_ids: [B, T]; None counts from the past's length, or the unmasked tokens of each
                row.
            kv_cache: a `KVCache`, in place of `past_kv`; these tokens are written to it.

        Returns:
            Logits [B, T, vocab_size], or without `out_head` hidden states [B, T, width]; with
            `use_cache` (that, past_kv).

        Raises:
            ValueError: more tokens than context_length; an argument of another shape; two that
                exclude each other.
            IndexError: an id outside the vocabulary.
            TypeError: an argument of another kind.
        """
        if input_embeds is None:
            input_ids = either("Llama3Model", in_idx=in_idx, input_ids=input_ids)
            check_ids(input_ids)
            check_range(input_ids, self.config.vocab_size)
            input_embeds = self.tok_emb(input_ids)
        check_embeddings(input_embeds, self.config.hidden_size)
        input_embeds = input_embeds.to(
            self.tok_emb.weight.dtype
        )  # a script's float32 projection joins a model of 16 bits
        if past_kv is not None and kv_cache is not None:
            raise ValueError("give past_kv or kv_cache, not both")
        if kv_cache is None and (use_cache or past_kv is not None):
            kv_cache = self._cache(past_kv, len(input_embeds))
        hidden_states = self._decode(input_embeds, attention_mask, whole(position_ids), kv_cache)
        answer = hidden_states if self.from_config else self.out_head(hidden_states)
        return (
            (answer, [(layer.keys, layer.values) for layer in kv_cache.layers])
            if use_cache
            else answer
        )

    def forward_with_embeds(
        self,
        inputs_embeds: torch.Tensor,
        past_kv: list[KeyValue] | None = None,
        use_cache: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, list[KeyValue]]:
        """`forward` on embeddings [B, T, width]: visual tokens before words', for one."""
        return self(input_embeds=inputs_embeds, past_kv=past_kv, use_cache=use_cache)

    def _cache(self, past_kv: list[KeyValue] | None, batch: int) -> KVCache:
        if past_kv is None:
            return KVCache()
        if not isinstance(past_kv, (list, tuple)) or len(past_kv) != len(self.trf_blocks):
            count = len(past_kv) if isinstance(past_kv, (list, tuple)) else type(past_kv).__name__
            raise ValueError(
                f"past_kv must be a list of {len(self.trf_blocks)} pairs (k, v), one per layer, got {count}"
            )
        layers = [
            LayerCache(pair, block.att, batch)
            for pair, block in zip(past_kv, self.trf_blocks, strict=True)
        ]
        if len(lengths := {layer.get_seq_length() for layer in layers}) > 1:
            raise ValueError(
                f"past_kv must hold as many tokens in every layer, got {sorted(lengths)}"
            )
        return KVCache() if lengths == {0} else KVCache.of(layer.pair for layer in layers)

    def _decode(self, embeds, attention_mask, position_ids, kv_cache) -> torch.Tensor:
        check_cache(kv_cache)
        past = int(past_length(kv_cache))
        tokens, longest = past + embeds.shape[1], self.config.context_length
        if tokens > longest:
            raise ValueError(
                f"Llama3Model: {tokens} tokens ({past} of them cached) are more than context_length, {longest}"
            )
        if not (isinstance(attention_mask, torch.Tensor) and attention_mask.dim() == 4):
            return (
                super()
                .forward(None, embeds, attention_mask, position_ids, kv_cache)
                .last_hidden_state
            )
        for block in self.trf_blocks:  # each reads the mask for itself
            embeds = block(
                hidden_states=embeds,
                attention_mask=attention_mask,
                position_ids=position_ids,
                kv_cache=kv_cache,
            )
        return self.final_norm(embeds)


class Llama3ForCausalLM(nn.Module):
    """A `Llama3Model` of a LLAMA32Config, `model`, and its output head, `lm_head`."""

    def __init__(self, config: MllamaTextConfig):
        super().__init__()
        if not isinstance(config, MllamaTextConfig):
            raise TypeError(
                f"Llama3ForCausalLM: config must be a LLAMA32Config, got {type(config).__name__}; Llama3Model takes a dict"
            )
        self.config = config
        self.vocab_size = config.vocab_size
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
        input_ids: torch.Tensor | None = None,
        input_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        kv_cache: Cache | None = None,
    ) -> tuple[torch.Tensor, Cache | None]:
        """(logits [B, T, vocab_size], kv_cache); arguments as `Llama3Model.forward`'s."""
        return self.lm_head(
            self.model(input_ids, input_embeds, attention_mask, position_ids, kv_cache)
        ), kv_cache
