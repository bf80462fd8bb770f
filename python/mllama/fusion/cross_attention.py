"""Gated cross-attention: decoder layers in which text attends to the features of pictures.

What a text position sees is told per tile, and changes only where a picture's placeholder stands:
positions between two changes are one call of the attention operator, and a [T, S] mask is never
made.
"""

from dataclasses import dataclass, replace

import torch
from torch import nn

from mllama.config.checks import check_reference
from mllama.config.spec import TextSpec
from mllama.nn.attention import split_heads
from mllama.nn.cache import Cache
from mllama.nn.checkpointing import CheckpointedLayer
from mllama.nn.gate import gated_add
from mllama.nn.mlp import GatedMLP
from mllama.nn.norm import RMSNorm
from mllama.ops.attention import attention, attention_weights


@dataclass(frozen=True)
class Segment:
    """Text positions `start` to `end` (exclusive), whose rows each see the same keys throughout.

    Attributes:
        start, end: the positions.
        key_mask: bool [B, S], the keys that each row sees; None where all rows see all.
        blind: no row sees anything.
    """

    start: int
    end: int
    key_mask: torch.Tensor | None = None
    blind: bool = False


@dataclass(frozen=True)
class CrossAttentionContext:
    """What the cross-attention layers of one forward pass share.

    Attributes:
        states: features of the pictures that are new in this pass, [B, keys, hidden], or None.
        kept: bool [pictures * tiles], of all pictures so far: the tiles that have keys. On the CPU.
        segments: the text's positions, in order; None is one segment that sees all keys.
        visible: bool [B, T, 1], False where a position sees no picture; None where all see one.
    """

    states: torch.Tensor | None
    kept: torch.Tensor
    segments: tuple[Segment, ...] | None = None
    visible: torch.Tensor | None = None

    def to(self, device: torch.device | str | int) -> "CrossAttentionContext":
        """The same on another device; accelerate asks for it where layers are spread over several."""
        states, visible = (
            None if tensor is None else tensor.to(device) for tensor in (self.states, self.visible)
        )
        segments = self.segments and tuple(
            segment
            if segment.key_mask is None
            else replace(segment, key_mask=segment.key_mask.to(device))
            for segment in self.segments
        )
        return replace(self, states=states, segments=segments, visible=visible)


def cross_context(
    states: torch.Tensor | None,
    mask: torch.Tensor | None,
    tokens_per_tile: int,
    reference: str = "meta",
    *,
    held: torch.Tensor | None = None,
    filled: torch.Tensor | None = None,
) -> CrossAttentionContext | None:
    """Prepare one forward pass.

    Args:
        states: projected features of new pictures, [B, pictures * tiles * tokens_per_tile, hidden],
            or None.
        mask: [B, T, pictures, tiles] of any dtype, non-zero where a position sees a tile, over
            cached pictures and new ones; None lets every position see all.
        tokens_per_tile: keys of one tile.
        reference: what a position that sees no picture does. "meta": the layer leaves it as it is.
            "hf", as transformers: it attends to every key, padding too, and only the feed-forward
            half leaves it.
        held: `kept` of the pass before, where its keys are in the cache.
        filled: [B, pictures, tiles] of any dtype, zero where a tile of a new picture is empty. With
            "meta" and a mask, tiles that are empty in every row, and seen by no position, get no
            keys: nothing would attend to them.

    Returns:
        The context, or None where there is no picture: layers given None do nothing.

    Raises:
        TypeError: mask is no tensor.
        ValueError: mask or filled do not fit the keys, mask shows a tile that got none, or a
            reference that is not known.
    """
    check_reference(reference)
    held = torch.ones(0, dtype=torch.bool, device="cpu") if held is None else held
    new = torch.ones(
        0 if states is None else states.shape[1] // tokens_per_tile, dtype=torch.bool, device="cpu"
    )
    columns = len(held) + len(new)
    if not columns:
        return None
    if mask is None:
        return CrossAttentionContext(states, torch.cat([held, new]))
    if not isinstance(mask, torch.Tensor):
        raise TypeError(
            f"cross_attention_mask must be a torch.Tensor or None, got {type(mask).__name__}"
        )
    if mask.dim() != 4 or mask.shape[2] * mask.shape[3] != columns:
        raise ValueError(
            f"cross_attention_mask must be [batch, tokens, pictures, tiles] for {columns} tiles, got {list(mask.shape)}"
        )
    seen = (mask != 0).flatten(2)
    host = seen.cpu()
    shown = host.flatten(0, 1).any(0)
    if reference == "meta" and states is not None and filled is not None:
        new = _used(filled, new) | shown[len(held) :]
        if not new.all():
            states = states.unflatten(1, (len(new), tokens_per_tile))[:, new].flatten(1, 2)
    kept = torch.cat([held, new])
    if (shown & ~kept).any():
        raise ValueError(
            "cross_attention_mask must not show tiles that were empty when their picture was given"
        )
    if not kept.all():
        seen, host = seen[..., kept], host[..., kept]
    visible = None if host.any(-1).all() else seen.any(-1, keepdim=True)
    if reference == "hf" and visible is not None:
        seen = seen | ~visible
        host = seen.cpu()
    return CrossAttentionContext(states, kept, _segments(seen, host, tokens_per_tile), visible)


def _used(filled: torch.Tensor, new: torch.Tensor) -> torch.Tensor:
    """bool [pictures * tiles]: tiles that are filled in some row; all of them where none is, so
    that a picture always has keys.
    """
    used = (filled != 0).flatten(1).any(0).cpu()
    if used.shape != new.shape:
        raise ValueError(
            f"aspect_ratio_mask must be [batch, pictures, tiles] for {len(new)} tiles, got {list(filled.shape)}"
        )
    return used if used.any() else new


def _segments(seen: torch.Tensor, host: torch.Tensor, tokens_per_tile: int) -> tuple[Segment, ...]:
    """bool [B, T, tiles], and the same on the CPU -> runs of positions over which no row changes."""
    changes = (host[:, 1:] != host[:, :-1]).any(-1).any(0).nonzero().flatten() + 1
    edges = [0, *changes.tolist(), host.shape[1]]
    segments = []
    for start, end in zip(edges, edges[1:], strict=False):
        rows = host[:, start]
        key_mask = None if rows.all() else seen[:, start].repeat_interleave(tokens_per_tile, -1)
        segments.append(Segment(start, end, key_mask, blind=not rows.any()))
    return tuple(segments)


class CrossAttention(nn.Module):
    """Grouped-query attention of text over pictures, with a norm on every head of q and k and no
    positions.

    Args:
        config: the decoder's.
        layer_idx: this layer's place in the cache.
    """

    def __init__(self, config: TextSpec, layer_idx: int):
        super().__init__()
        self.head_dim = config.head_dim
        self.kv_heads = config.num_key_value_heads
        self.layer_idx = layer_idx
        heads, kv_heads = (
            config.num_attention_heads * config.head_dim,
            config.num_key_value_heads * config.head_dim,
        )
        self.q_proj = nn.Linear(config.hidden_size, heads, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_heads, bias=False)
        self.o_proj = nn.Linear(heads, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(
        self,
        x: torch.Tensor,
        cross: CrossAttentionContext,
        cache: Cache | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            x: [B, T, hidden].
            cross: what the positions see.
            cache: cache that new pictures' keys and values are appended to and all S of them read
                from.
            output_attentions: also return the probabilities.

        Returns:
            ([B, T, hidden], zero where a position sees no key; probabilities [B, heads, T, S]
            float32 or None)
        """
        q = self.q_norm(split_heads(self.q_proj(x), self.head_dim))
        k, v = self._keys_values(x, cross.states)
        if cache is not None:
            k, v = cache.update_cross(self.layer_idx, k, v)  # (B, S, KV, D)
        attended, weights = [], []
        for segment in cross.segments or (Segment(0, x.shape[1]),):
            part = q[:, segment.start : segment.end]
            attended.append(
                torch.zeros_like(part)
                if segment.blind
                else attention(part, k, v, key_mask=segment.key_mask)
            )
            if output_attentions:
                weights.append(attention_weights(part, k, key_mask=segment.key_mask))
        attended = attended[0] if len(attended) == 1 else torch.cat(attended, 1)
        return self.o_proj(attended.flatten(2)), torch.cat(
            weights, 2
        ) if output_attentions else None

    def _keys_values(
        self, x: torch.Tensor, states: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """[B, keys, kv heads, head_dim] of the new pictures; no keys where there are none."""
        if states is None:
            empty = x.new_empty(x.shape[0], 0, self.kv_heads, self.head_dim)
            return empty, empty
        k, v = (
            split_heads(projection(states), self.head_dim)
            for projection in (self.k_proj, self.v_proj)
        )
        return self.k_norm(k), v


class CrossAttentionDecoderLayer(CheckpointedLayer):
    """A decoder layer that attends to pictures in the place of text; both halves are scaled by tanh
    of a learned number.
    """

    def __init__(self, config: TextSpec, layer_idx: int):
        super().__init__()
        self.cross_attn = CrossAttention(config, layer_idx)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.cross_attn_attn_gate = nn.Parameter(torch.zeros(1))
        self.cross_attn_mlp_gate = nn.Parameter(torch.zeros(1))

    def __call__(
        self,
        hidden_states: torch.Tensor,
        positions=None,
        cache: Cache | None = None,
        *,
        cross=None,
        **context,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As `forward`; the pictures' features become an argument of their own, where reentrant
        checkpointing looks for gradients.
        """
        states = None if cross is None else cross.states
        return super().__call__(
            hidden_states, positions, states, cache=cache, cross=cross, **context
        )

    def forward(
        self,
        hidden_states: torch.Tensor,
        positions: tuple[torch.Tensor, torch.Tensor] | None = None,
        states: torch.Tensor | None = None,
        *,
        cache: Cache | None = None,
        cross: CrossAttentionContext | None = None,
        output_attentions: bool = False,
        **context,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, T, hidden] -> (the same shape, probabilities or None). `positions` and `context` are
        for layers that attend to text; without `cross` the layer does nothing."""
        if cross is None:
            return hidden_states, None
        cross = replace(cross, states=states)
        attended, weights = self.cross_attn(
            self.input_layernorm(hidden_states), cross, cache, output_attentions
        )
        hidden_states = gated_add(hidden_states, attended, self.cross_attn_attn_gate)
        fed = self.mlp(self.post_attention_layernorm(hidden_states))
        if cross.visible is not None:
            fed = fed.masked_fill(~cross.visible, 0)
        return gated_add(hidden_states, fed, self.cross_attn_mlp_gate), weights
