"""Gated cross-attention: decoder layers in which text attends to image features.

`cross_context` computes which keys are visible to each position.
"""

from dataclasses import replace

import torch
from torch import nn

from mllama.config.spec import TextSpec
from mllama.fusion.base import DecoderInputs, Fusion, ModelInputs, Parts, count_images, embed
from mllama.fusion.cross_context import CrossAttentionContext, Segment, cross_context
from mllama.fusion.prepend import share_out
from mllama.nn.adapted import linears
from mllama.nn.attention import split_heads
from mllama.nn.cache import Cache
from mllama.nn.checkpointing import CheckpointedLayer
from mllama.nn.checks import check_floating
from mllama.nn.gate import gated_add
from mllama.nn.mlp import GatedMLP
from mllama.nn.norm import RMSNorm
from mllama.ops.attention import attention, attention_weights


class CrossAttention(nn.Module):
    """Grouped-query attention of text over images, with normalized heads of q and k and without
    positions.

    Args:
        config: the decoder's spec.
        layer_idx: index of this layer in the cache.
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
            cross: image features and visibility.
            cache: cache that the keys and values of new images are appended to; all S are read.
            output_attentions: also return the probabilities.

        Returns:
            ([B, T, hidden], zero where no key is visible; probabilities [B, heads, T, S]
            float32 or None)
        """
        q = self.q_norm(split_heads(self.q_proj(x), self.head_dim))
        if cross.states is None:
            k = v = q.new_empty(q.shape[0], 0, self.kv_heads, self.head_dim)
        else:
            k, v = self.keys_values(cross.states)
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

    def keys_values(self, states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Features [B, keys, hidden] -> their keys and values, [B, keys, kv_heads, head_dim]."""
        k, v = (
            split_heads(part, self.head_dim) for part in linears(states, self.k_proj, self.v_proj)
        )
        return self.k_norm(k), v


class CrossAttentionDecoderLayer(CheckpointedLayer):
    """A decoder layer that attends to images instead of text. Attention and feed-forward outputs
    are scaled by tanh of a learned gate.
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
        """As `forward`. The image features become an argument of their own, because reentrant
        checkpointing tracks gradients of arguments only.
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
        ignored; without `cross` the input is returned unchanged."""
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


class CrossAttentionFusion(Fusion):
    """Layers of the decoder attend to images; placeholders are embedded like other ids."""

    def prepare(
        self, inputs: ModelInputs, padding_mask: torch.Tensor | None, parts: Parts
    ) -> DecoderInputs:
        mask, cache = inputs.cross_attention_mask, inputs.cache
        placeholders, embeds = None, inputs.inputs_embeds
        if embeds is None:
            placeholders = self.find_placeholders(inputs.input_ids)
            embeds = embed(inputs.input_ids, parts.embedding)
        elif isinstance(mask, torch.Tensor) and 0 < mask.shape[1] < embeds.shape[1]:
            raise ValueError(  # with fewer rows it is ambiguous which positions they are for
                f"cross_attention_mask must have a row for each of {embeds.shape[1]} "
                f"inputs_embeds, got {mask.shape[1]}"
            )
        states, attentions = self._states(inputs, parts, embeds)
        rows_of_mask = _rows_of_mask(mask, inputs.shape, 0 if cache is None else cache.length)
        if rows_of_mask is not None and placeholders is not None and states is not None:
            check_visible(mask, placeholders)
        cached = None if cache is None else cache.tile_mask
        cross = cross_context(
            None if states is None else self.by_rows(states, embeds.shape[0]).to(embeds.dtype),
            rows_of_mask,
            self.tokens_per_tile(parts),
            parts.reference,
            cached=cached,
            aspect_ratio_mask=inputs.aspect_ratio_mask,
        )
        if cache is not None and cross is not None:
            cache.tile_mask = cross.tile_mask
        if inputs.first_key is not None and cross is not None:
            _check_mask_of_packed(mask, inputs.shape[1])
        more = {"placeholders": placeholders, "features": states, "attentions": attentions}
        return self.pass_on(inputs, padding_mask, embeds, cross=cross, **more)

    def tokens_per_tile(self, parts: Parts) -> int:
        """Keys per tile; an untiled image counts as one tile."""
        return self.spec.tokens_per_image

    def by_rows(self, features: torch.Tensor, rows: int) -> torch.Tensor:
        """[images, patches, hidden] -> [rows, images per row * patches, hidden]."""
        return share_out(features, rows)

    def _states(
        self, inputs: ModelInputs, parts: Parts, embeds: torch.Tensor
    ) -> tuple[torch.Tensor | None, tuple | None]:
        """Features and attentions of new images."""
        count_images(inputs, self.spec, parts.encoder)  # checks them
        if inputs.pixel_values is None:
            return inputs.image_features, None
        return parts.encode(inputs)


class TiledCrossAttentionFusion(CrossAttentionFusion):
    """Fusion of Llama-3.2-Vision: tiled images, the same number in every row."""

    placeholders_per_image = 1  # type: ignore[assignment]

    def tokens_per_tile(self, parts: Parts) -> int:
        return parts.encoder.tokens_per_tile

    def by_rows(self, features: torch.Tensor, rows: int) -> torch.Tensor:
        """[rows, images * tiles * tokens, hidden], unchanged."""
        return features

    def _states(self, inputs, parts, embeds):
        pixels, features, rows = inputs.pixel_values, inputs.image_features, embeds.shape[0]
        if pixels is not None:
            parts.encoder.check(pixels, inputs.aspect_ratio_ids, inputs.aspect_ratio_mask)
            if pixels.shape[0] != rows:
                raise ValueError(
                    f"pixel_values must have {rows} rows, one per row of text, got "
                    f"{pixels.shape[0]}"
                )
            return parts.encode(inputs)
        if features is not None:
            _check_tile_features(
                features, rows, parts.encoder.tokens_per_tile, self.spec.text.hidden_size
            )
        return features, None


def _rows_of_mask(
    mask: torch.Tensor | None, shape: tuple[int, int], past: int | torch.Tensor
) -> torch.Tensor | None:
    """The rows of a cross-attention mask for the new tokens: all, or those after the cached ones,
    with the last row repeated.
    """
    if mask is None:
        return None
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"cross_attention_mask must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dim() != 4 or mask.shape[0] != shape[0] or mask.shape[1] == 0:
        raise ValueError(
            f"cross_attention_mask must be [{shape[0]}, tokens, images, tiles], "
            f"got {list(mask.shape)}"
        )
    if mask.shape[1] == shape[1]:
        return mask
    rows = torch.arange(shape[1], device=mask.device) + past
    return mask[:, rows.clamp(max=mask.shape[1] - 1)]


def check_visible(mask: torch.Tensor, placeholders: torch.Tensor) -> None:
    """Reject a mask with fewer rows than tokens that hides every image from a placeholder [B, T]:
    its rows are shifted against the text, as when padding was moved after the mask was made.
    """
    if mask.shape[1] >= placeholders.shape[1] or torch.compiler.is_compiling():
        return
    blind = placeholders[:, : mask.shape[1]] & ~(mask != 0).flatten(2).any(-1)
    if blind.any():
        row, position = blind.nonzero()[0].tolist()
        raise ValueError(
            f"cross_attention_mask, of {mask.shape[1]} rows for {placeholders.shape[1]} tokens, "
            f"shows the placeholder at position {position} of row {row} no image: was the padding "
            "moved after the mask was made?"
        )


def _check_mask_of_packed(mask: torch.Tensor | None, length: int) -> None:
    """Require a mask for packed rows: without one a sequence would attend to others' images."""
    if not torch.compiler.is_compiling() and (mask is None or mask.shape[1] != length):
        given = "None" if mask is None else list(mask.shape)
        raise ValueError(
            f"cross_attention_mask must say for each of {length} positions what it sees: "
            f"position_ids restart; got {given}"
        )


def _check_tile_features(
    features: torch.Tensor, rows: int, tokens_per_tile: int, size: int
) -> None:
    check_floating("image_features", features)
    shape = features.shape
    if len(shape) != 3 or shape[0] != rows or shape[1] % tokens_per_tile or shape[2] != size:
        raise ValueError(
            f"image_features must be [{rows}, images x tiles x {tokens_per_tile}, {size}], "
            f"got {list(shape)}"
        )
