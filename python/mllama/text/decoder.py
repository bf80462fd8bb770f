"""The decoder, Llama's or Gemma's by its config: token ids or embeddings -> hidden states."""

from collections.abc import Callable
from itertools import islice

import torch
from torch import nn
from transformers import Cache
from transformers.modeling_layers import GradientCheckpointingLayer

from mllama.config.spec import TextSpec
from mllama.hf.cache import check_cache, key_length, past_length
from mllama.hf.compat import DecoderOutput, one_cache
from mllama.nn.attention import CausalAttention
from mllama.nn.mlp import GatedMLP
from mllama.nn.norm import RMSNorm, add_and_norm
from mllama.nn.rope import RotaryEmbedding
from mllama.ops._dispatch import FLOAT_DTYPES
from mllama.text.packing import find_starts


class DecoderLayer(GradientCheckpointingLayer):
    """Pre-norm transformer block. The `make_` functions are its parts, for a subclass whose parts
    are subclasses too.
    """

    def __init__(self, config: TextSpec, layer_idx: int):
        super().__init__()
        self.self_attn = self.make_attention(config, layer_idx)
        self.mlp = self.make_mlp(config)
        self.input_layernorm = self.make_norm(config)
        self.post_attention_layernorm = self.make_norm(config)

    @staticmethod
    def make_attention(config: TextSpec, layer_idx: int) -> CausalAttention:
        heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
        return CausalAttention(
            config.hidden_size, heads, kv_heads, config.head_dim, layer_idx, config.attention_bias
        )

    @staticmethod
    def make_mlp(config: TextSpec) -> GatedMLP:
        return GatedMLP(
            config.hidden_size, config.intermediate_size, config.hidden_act, config.mlp_bias
        )

    @staticmethod
    def make_norm(config: TextSpec) -> RMSNorm:
        return RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None = None,
        cross: object = None,
        **context,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, hidden] -> (the same shape, probabilities or None). `context` goes to
        `CausalAttention.forward`; `cross` is for the layers of another kind beside this one."""
        normed = self.input_layernorm(hidden_states)
        attended, weights = self.self_attn(normed, positions=positions, cache=cache, **context)
        normed, hidden_states = add_and_norm(self.post_attention_layernorm, attended, hidden_states)
        return hidden_states + self.mlp(normed), weights


class ScaledEmbedding(nn.Embedding):
    """Looked-up vectors times `embed_scale`, the factor in the matrix's dtype, as transformers
    does. PEFT reads the attribute.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim)
        self.embed_scale = embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int [...] -> [..., embedding_dim]."""
        return super().forward(input_ids) * torch.tensor(
            self.embed_scale, dtype=self.weight.dtype, device=self.weight.device
        )


class Decoder(nn.Module):
    """Embeddings, layers and final norm; the output head belongs to the model around it.

    Args:
        config: sizes and choices.
        cross_layer: makes a layer for the places in `config.cross_attention_layers`, called and
            answering as `DecoderLayer` is.
    """

    layer_class = DecoderLayer  # a subclass may have another

    def __init__(
        self, config: TextSpec, cross_layer: Callable[[TextSpec, int], nn.Module] | None = None
    ):
        super().__init__()
        self.config = config
        rows, scale = config.vocab_size + config.extra_embeddings, config.embedding_scale
        self.embed_tokens = (
            nn.Embedding(rows, config.hidden_size)
            if scale is None
            else ScaledEmbedding(rows, config.hidden_size, scale)
        )
        crossed = set(config.cross_attention_layers or ())
        self.layers = nn.ModuleList(
            (cross_layer if index in crossed else self.layer_class)(config, index)
            for index in range(config.num_hidden_layers)
        )
        self.norm = self.layer_class.make_norm(config)
        self.rotary = RotaryEmbedding(config.head_dim, config.rope_parameters)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        cache: Cache | None = None,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        prefix_length: torch.Tensor | None = None,
        first_key: torch.Tensor | None = None,
        cross: object = None,
        past_key_values: Cache | None = None,
    ) -> DecoderOutput:
        """
        Args:
            input_ids: int [B, T]; or give
            inputs_embeds: [B, T, hidden].
            attention_mask: [B, past + T] of any dtype, zero where padded (either side); None sees
                everything. Or [B or 1, heads or 1, T, keys], over all the keys there are (a static
                cache's unfilled slots too): bool, True where a position sees a key, or floats that
                are added to the scores. Such a mask is taken as it is, in place of causality and
                prefix too.
            position_ids: int [B or 1, T]. None counts the unmasked tokens of each row, or past + 0,
                1, ... without a mask of two dimensions. Without mask and cache, a position that is
                not one more than the one before it begins a sequence that does not see those before
                it.
            cache: a transformers cache, dynamic or static.
            output_attentions: also return each layer's probabilities [B, heads, T, keys], float32.
            output_hidden_states: also return the embeddings, each further layer's input, and the
                final norm's output: layers + 1 tensors.
            prefix_length: int64 [B], positions at a row's front, its padding there included, that
                every other sees, or [B, T], that each sees: None is causal.
            first_key: int64 [B or 1, T], where each position's sequence begins. None is told from
                position_ids.
            cross: handed to every layer: what cross-attention layers attend to.
            past_key_values: another name of `cache`.

        Raises:
            ValueError: both or none of ids and embeddings; a mask or positions of another shape.
            TypeError: a cache that is no Cache; a mask of four dimensions of another dtype.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give exactly one of input_ids and inputs_embeds")
        cache = one_cache(cache, past_key_values)
        check_cache(cache)
        check_mask(attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        else:
            check_embeddings(inputs_embeds, self.config.hidden_size)

        batch, length = inputs_embeds.shape[:2]
        past = past_length(cache)
        keys = key_length(cache, length)
        _check_room(keys, length, past)
        padding_mask, attn_mask = split_mask(attention_mask)
        _check_mask_size(padding_mask, batch, length, past)
        if attn_mask is not None:
            _check_attn_mask(attn_mask, batch, self.config.num_attention_heads, length, keys)
            if prefix_length is not None or first_key is not None:
                raise ValueError(
                    "prefix_length and first_key must be None beside an attention_mask of 4 dimensions, which says all by itself"
                )
        if position_ids is None:
            position_ids = count_positions(padding_mask, length, past, inputs_embeds.device)
        elif not isinstance(position_ids, torch.Tensor):
            raise TypeError(
                f"position_ids must be a torch.Tensor, got {type(position_ids).__name__}"
            )
        elif (
            position_ids.dim() != 2
            or position_ids.shape[0] not in (1, batch)
            or position_ids.shape[1] != length
        ):
            raise ValueError(
                f"position_ids must be [{batch} or 1, {length}], got {list(position_ids.shape)}"
            )
        elif first_key is None and attention_mask is None and cache is None:
            first_key = find_starts(position_ids)
        context = {
            "key_mask": _key_mask(padding_mask, keys),
            # None, the operator's cheap way: the last query sees the last key. Not so where a
            # static cache shows unfilled slots.
            "query_offset": None if isinstance(past, int) and keys == past + length else past,
            "prefix_length": prefix_length,
            "first_key": first_key,
            "attn_mask": attn_mask,
            "cross": cross,
            "output_attentions": output_attentions,
        }

        hidden_states = inputs_embeds
        positions = self.rotary(position_ids)
        states, attentions = [], []
        for layer in islice(self.layers, self.config.num_hidden_layers):
            if output_hidden_states:
                states.append(hidden_states)
            hidden_states, weights = layer(
                hidden_states, positions=positions, cache=cache, **context
            )
            attentions.append(weights)
        hidden_states = self.norm(hidden_states)
        return DecoderOutput(
            last_hidden_state=hidden_states,
            cache=cache,
            hidden_states=(*states, hidden_states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


def check_mask(attention_mask: torch.Tensor | None) -> None:
    """Raise TypeError unless it is a tensor or None, of 4 dimensions bool or floating; ValueError
    unless it is 2-D or 4-D.
    """
    if attention_mask is None:
        return
    if not isinstance(attention_mask, torch.Tensor):
        raise TypeError(
            f"attention_mask must be a torch.Tensor or None, got {type(attention_mask).__name__}"
        )
    if attention_mask.dim() not in (2, 4):
        raise ValueError(
            "attention_mask must be [batch, past + new tokens], zero where padded, or [batch, 1 or heads, new tokens, keys]; "
            f"got {list(attention_mask.shape)}"
        )
    if attention_mask.dim() == 4 and attention_mask.dtype not in (torch.bool, *FLOAT_DTYPES):
        raise TypeError(
            "attention_mask of 4 dimensions must be bool, True where a key is seen, or float32, bfloat16 or float16, added to the scores; "
            f"got {attention_mask.dtype}"
        )


def split_mask(
    attention_mask: torch.Tensor | None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(the mask if it is [B, past + T] and says what is padding, the mask if it is 4-D and says
    all), at least one of them None.
    """
    if attention_mask is None or attention_mask.dim() == 2:
        return attention_mask, None
    return None, attention_mask


def check_embeddings(inputs_embeds: torch.Tensor, size: int) -> None:
    """Raise TypeError unless they are a floating tensor, ValueError unless they are [B, T, size]
    with a token.
    """
    if not isinstance(inputs_embeds, torch.Tensor) or not inputs_embeds.is_floating_point():
        kind = getattr(inputs_embeds, "dtype", type(inputs_embeds).__name__)
        raise TypeError(f"inputs_embeds must be a floating torch.Tensor, got {kind}")
    if inputs_embeds.dim() != 3 or inputs_embeds.shape[1] == 0 or inputs_embeds.shape[2] != size:
        raise ValueError(
            f"inputs_embeds must be [batch, tokens, {size}] with at least one token, got {list(inputs_embeds.shape)}"
        )


def _check_room(keys: int, length: int, past: int | torch.Tensor) -> None:
    """A static cache that is full would fail in the middle of the layers."""
    if not torch.compiler.is_compiling() and int(past) + length > keys:
        raise ValueError(
            f"cache has room for {keys} tokens: {int(past)} are in it, and {length} are to come"
        )


def _check_mask_size(
    mask: torch.Tensor | None, batch: int, length: int, past: int | torch.Tensor
) -> None:
    if mask is None:
        return
    if mask.shape[0] != batch:
        raise ValueError(f"attention_mask must have {batch} rows, got {mask.shape[0]}")
    if (
        isinstance(past, torch.Tensor) and torch.compiler.is_compiling()
    ):  # reading a static cache's length would break the graph
        return
    if mask.shape[1] != int(past) + length:
        raise ValueError(
            f"attention_mask must cover {int(past)} cached and {length} new tokens, got {mask.shape[1]} columns"
        )


def _check_attn_mask(mask: torch.Tensor, batch: int, heads: int, length: int, keys: int) -> None:
    shape = mask.shape
    if (
        shape[0] not in (1, batch)
        or shape[1] not in (1, heads)
        or shape[2] not in (1, length)
        or shape[3] != keys
    ):
        raise ValueError(
            f"attention_mask of 4 dimensions must be [{batch}, 1 or {heads}, {length}, {keys}], got {list(shape)}"
        )


def count_positions(
    mask: torch.Tensor | None, length: int, past: int | torch.Tensor, device: torch.device
) -> torch.Tensor:
    """[B or 1, T]: how many unmasked tokens of its row stand before each new token."""
    if mask is None:
        return torch.arange(length, device=device).unsqueeze(0) + past
    return ((mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _key_mask(mask: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """bool [B, keys]; slots of a static cache beyond the mask are hidden by causality, whatever
    stands here.
    """
    return None if mask is None else nn.functional.pad(mask != 0, (0, keys - mask.shape[1]))
