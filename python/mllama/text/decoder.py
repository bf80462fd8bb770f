"""The decoder of Llama and Gemma, built from a spec: token ids or embeddings -> hidden states."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch
from torch import nn

from mllama.config.spec import TextSpec
from mllama.nn.attention import CausalAttention
from mllama.nn.cache import Cache
from mllama.nn.checkpointing import CheckpointedLayer
from mllama.nn.mlp import GatedMLP
from mllama.nn.norm import RMSNorm, add_and_norm
from mllama.nn.rope import RotaryEmbedding
from mllama.text.checks import check_mask, check_text, split_mask
from mllama.text.packing import find_starts


@dataclass
class DecoderOutput:
    """Output of `Decoder`.

    Attributes:
        last_hidden_state: [B, T, hidden], after the final norm.
        hidden_states: layers + 1 of [B, T, hidden], or None.
        attentions: one [B, heads, T, keys] float32 per layer, or None.
    """

    last_hidden_state: torch.Tensor
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor | None, ...] | None = None


class DecoderLayer(CheckpointedLayer):
    """Transformer block with a norm before each half, or before and after each.

    Norm names are Hugging Face's: without post-norms, `post_attention_layernorm` precedes the
    feed-forward block; with post-norms, it follows attention.
    """

    def __init__(self, config: TextSpec, layer_idx: int):
        super().__init__()
        layer, hidden = config.layers[layer_idx], config.hidden_size
        make_norm = partial(RMSNorm, eps=config.rms_norm_eps, offset=config.norm_offset)
        self.self_attn = CausalAttention(
            hidden,
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
            layer_idx,
            config.attention_bias,
            window=layer.window,
            scale=layer.scale,
            softcap=layer.softcap,
            make_norm=make_norm if layer.qk_norm else None,
        )
        self.mlp = GatedMLP(hidden, config.intermediate_size, config.hidden_act, config.mlp_bias)
        self.input_layernorm = make_norm(hidden)
        self.post_attention_layernorm = make_norm(hidden)
        self.post_norms = layer.post_norms
        if layer.post_norms:
            self.pre_feedforward_layernorm = make_norm(hidden)
            self.post_feedforward_layernorm = make_norm(hidden)

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor],
        cache: Cache | None = None,
        cross: object = None,
        **context,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, hidden] -> (the same shape, probabilities or None).

        `context` is passed to `CausalAttention.forward`; `cross` is for cross-attention layers.
        """
        normed = self.input_layernorm(hidden_states)
        attended, weights = self.self_attn(normed, positions=positions, cache=cache, **context)
        if self.post_norms:
            attended = self.post_attention_layernorm(attended)
            normed, hidden_states = add_and_norm(
                self.pre_feedforward_layernorm, attended, hidden_states
            )
            return hidden_states + self.post_feedforward_layernorm(self.mlp(normed)), weights
        normed, hidden_states = add_and_norm(self.post_attention_layernorm, attended, hidden_states)
        return hidden_states + self.mlp(normed), weights


class ScaledEmbedding(nn.Embedding):
    """Embedding scaled by `embed_scale`, a factor in the matrix's dtype as in transformers. PEFT
    reads the attribute.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, embed_scale: float):
        super().__init__(num_embeddings, embedding_dim)
        self.embed_scale = embed_scale

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """int [...] -> [..., embedding_dim]."""
        weight = self.weight  # filled on its device: a copy from the host would wait
        return super().forward(input_ids) * weight.new_full((), self.embed_scale)


class Decoder(nn.Module):
    """Embedding, layers and final norm. The output head belongs to the model around it.

    Args:
        config: the decoder's spec.
        cross_layer: builds a cross-attention layer, with the interface of `DecoderLayer`.
    """

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
        makers = {"self": DecoderLayer, "cross": cross_layer}
        self.layers = nn.ModuleList(
            makers[layer.attention](config, index) for index, layer in enumerate(config.layers)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, config.norm_offset)
        ropes = list(dict.fromkeys(layer.rope for layer in config.layers))
        self.rotary = nn.ModuleList(
            RotaryEmbedding(config.head_dim, asdict(rope)) for rope in ropes
        )
        self.rope_of_layer = [ropes.index(layer.rope) for layer in config.layers]

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
    ) -> DecoderOutput:
        """
        Args:
            input_ids: int [B, T]; exclusive with inputs_embeds.
            inputs_embeds: [B, T, hidden].
            attention_mask: [B, past + T] of any dtype, zero where padded, on either side. Or [B or
                1, heads or 1, T, keys], over all keys (including a static cache's unused slots):
                bool, True where a key is visible, or floats that are added to the scores; such a
                mask replaces causality and prefix. Default: nothing is padded.
            position_ids: int [B or 1, T]. Default: the number of unmasked tokens before each, or
                past + 0, 1, ... without a 2-D mask. Without mask and cache, a position that is not
                its predecessor plus one begins a new sequence, which does not attend to those
                before it.
            cache: keys and values of earlier calls; those of this call are appended.
            output_attentions: also return each layer's probabilities [B, heads, T, keys], float32.
            output_hidden_states: also return the embeddings, each further layer's input, and the
                final norm's output: layers + 1 tensors.
            prefix_length: int64 [B], number of leading positions, padding included, that attend to
                each other in both directions; or [B, T] per position. Default: causal.
            first_key: int64 [B or 1, T], start of each position's sequence. Default: derived from
                position_ids.
            cross: passed to every layer: the context of the cross-attention layers.

        Raises:
            ValueError: both or neither of ids and embeddings are given; a mask or positions have
                the wrong shape.
            TypeError: a 4-D mask or positions have the wrong dtype.
        """
        check_text(input_ids, inputs_embeds, self.config.hidden_size)
        check_mask(attention_mask)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        position_ids, context = self._context(
            inputs_embeds, attention_mask, position_ids, cache, prefix_length, first_key
        )
        context |= {"cache": cache, "cross": cross, "output_attentions": output_attentions}
        return self._run(inputs_embeds, position_ids, output_hidden_states, context)

    def decode(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        cache: Cache,
        key_mask: torch.Tensor | None = None,
        cross: object = None,
    ) -> torch.Tensor:
        """`forward` of one more position per row, without the checks that wait for the device.

        Args:
            inputs_embeds: [B, 1, hidden].
            position_ids: int64 [B, 1].
            cache: of fixed size, with its length on the device.
            key_mask: bool [B, keys], False where padded.
            cross: as `forward`.

        Returns:
            [B, 1, hidden].
        """
        context = {
            "key_mask": key_mask,
            "query_offset": cache.length,
            "cache": cache,
            "cross": cross,
        }
        return self._run(inputs_embeds, position_ids, False, context).last_hidden_state

    def _run(
        self,
        hidden_states: torch.Tensor,
        position_ids: torch.Tensor,
        output_hidden_states: bool,
        context: dict[str, Any],
    ) -> DecoderOutput:
        """The layers and the norm, on embeddings; `context` is every layer's."""
        tables = [rotary(position_ids) for rotary in self.rotary]
        states, attentions = [], []
        layers = zip(self.layers, self.rope_of_layer, strict=False)  # some may be taken out
        for layer, rope in islice(layers, self.config.num_hidden_layers):
            if output_hidden_states:
                states.append(hidden_states)
            hidden_states, weights = layer(hidden_states, positions=tables[rope], **context)
            attentions.append(weights)
        hidden_states = self.norm(hidden_states)
        return DecoderOutput(
            hidden_states,
            (*states, hidden_states) if output_hidden_states else None,
            tuple(attentions) if context.get("output_attentions") else None,
        )

    def _context(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
        cache: Cache | None,
        prefix_length: torch.Tensor | None,
        first_key: torch.Tensor | None,
    ) -> tuple[torch.Tensor, dict[str, Any]]:
        """Position ids, and the mask arguments of every layer's attention."""
        batch, length = inputs_embeds.shape[:2]
        past, keys = (0, length) if cache is None else (cache.length, cache.num_keys(length))
        _check_room(keys, length, past)
        padding_mask, attn_mask = split_mask(attention_mask)
        _check_mask_size(padding_mask, batch, length, past)
        if attn_mask is not None:
            _check_attn_mask(attn_mask, batch, self.config.num_attention_heads, length, keys)
            if prefix_length is not None or first_key is not None:
                raise ValueError(
                    "prefix_length and first_key must be None beside an attention_mask of 4 "
                    "dimensions, which replaces them"
                )
        if position_ids is None:
            position_ids = count_positions(padding_mask, length, past, inputs_embeds.device)
        else:
            _check_positions(position_ids, batch, length)
            if first_key is None and attention_mask is None and cache is None:
                first_key = find_starts(position_ids)
        return position_ids, {
            "key_mask": _key_mask(padding_mask, keys),
            # None is the operator's fast path: the last query attends to the last key. It does not
            # hold for a static cache with unused slots.
            "query_offset": None if isinstance(past, int) and keys == past + length else past,
            "prefix_length": prefix_length,
            "first_key": first_key,
            "attn_mask": attn_mask,
        }


def _check_room(keys: int, length: int, past: int | torch.Tensor) -> None:
    """Reject a full static cache, which would fail inside the layers."""
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
    if isinstance(past, torch.Tensor) and torch.compiler.is_compiling():
        return  # reading a static cache's length would break the compiled graph
    if mask.shape[1] != int(past) + length:
        raise ValueError(
            f"attention_mask must cover {int(past)} cached and {length} new tokens, "
            f"got {mask.shape[1]} columns"
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
            f"attention_mask of 4 dimensions must be [{batch}, 1 or {heads}, {length}, {keys}], "
            f"got {list(shape)}"
        )


def _check_positions(position_ids: torch.Tensor, batch: int, length: int) -> None:
    if not isinstance(position_ids, torch.Tensor):
        raise TypeError(f"position_ids must be a torch.Tensor, got {type(position_ids).__name__}")
    shape = list(position_ids.shape)
    if shape not in ([1, length], [batch, length]):
        raise ValueError(f"position_ids must be [{batch} or 1, {length}], got {shape}")


def count_positions(
    mask: torch.Tensor | None, length: int, past: int | torch.Tensor, device: torch.device
) -> torch.Tensor:
    """[B or 1, T]: number of unmasked tokens before each new token in its row."""
    if mask is None and isinstance(past, int):
        return torch.arange(past, past + length, device=device).unsqueeze(0)
    if mask is None:
        return torch.arange(length, device=device).unsqueeze(0) + past
    return ((mask != 0).long().cumsum(-1) - 1).clamp(min=0)[:, -length:]


def _key_mask(mask: torch.Tensor | None, keys: int) -> torch.Tensor | None:
    """bool [B, keys]. Slots of a static cache beyond the mask are hidden by causality, so their
    values do not matter.
    """
    return None if mask is None else nn.functional.pad(mask != 0, (0, keys - mask.shape[1]))
