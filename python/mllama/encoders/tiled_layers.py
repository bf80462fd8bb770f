"""Layers of Llama-3.2-Vision's encoder: attention over all tiles of an image, and learned tile and
position embeddings.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from mllama.config.spec import TiledVisionSpec, count_patches
from mllama.nn.adapted import linears
from mllama.nn.attention import split_heads
from mllama.nn.checkpointing import CheckpointedLayer
from mllama.nn.gate import gated_add
from mllama.nn.mlp import MLP
from mllama.nn.norm import LayerNorm
from mllama.ops.attention import attention, attention_weights


class TileEmbedding(nn.Module):
    """A vector per tile, selected by the image's aspect ratio id; id 0 means no image."""

    def __init__(self, config: TiledVisionSpec):
        super().__init__()
        self.embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * config.hidden_size
        )
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, aspect_ratio_ids: torch.Tensor) -> torch.Tensor:
        """Add the tile vectors to x [images, tiles, tokens, hidden]; aspect_ratio_ids is int
        [images].
        """
        vectors = self.embedding(aspect_ratio_ids).float() * self.gate.float().tanh()
        return x + vectors.unflatten(1, (x.shape[1], 1, -1)).to(x.dtype)


class PositionEmbedding(nn.Module):
    """A vector per token of a tile, blended by a gate with one per token of every tile."""

    def __init__(self, config: TiledVisionSpec):
        super().__init__()
        tokens = count_patches(config) + 1
        self.embedding = nn.Parameter(
            torch.randn(tokens, config.hidden_size) * config.hidden_size**-0.5
        )
        self.tile_embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * tokens * config.hidden_size
        )
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, aspect_ratio_ids: torch.Tensor) -> torch.Tensor:
        """Add positions to x [images, tiles, tokens, hidden]; aspect_ratio_ids is int [images]."""
        gate = self.gate.float().tanh()
        own = self.tile_embedding(aspect_ratio_ids).view(x.shape)
        return x + ((1 - gate) * self.embedding.float() + gate * own.float()).to(x.dtype)


class TiledAttention(nn.Module):
    """Attention with the encoder's mask."""

    def __init__(self, hidden_size: int, heads: int):
        super().__init__()
        self.head_dim = hidden_size // heads
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(
        self,
        x: torch.Tensor,
        real: int,
        counts: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """
        Args:
            x: [images, S, hidden_size], real tokens before padding.
            real: number of real tokens. They attend to all S tokens, padding only to real tokens.
            counts: float32 [1, S], log of the number of equal tokens that each one represents.
                Default: one each.
            output_attentions: also return the probabilities.

        Returns:
            (the same shape, probabilities [images, heads, S, S] float32 or None)
        """
        q, k, v = (
            split_heads(part, self.head_dim)
            for part in linears(x, self.q_proj, self.k_proj, self.v_proj)
        )
        attended = [
            attention(q[:, :real], k, v, key_bias=counts),
            attention(q[:, real:], k[:, :real], v[:, :real]),
        ]
        weights = None
        if output_attentions:
            of_padding = attention_weights(q[:, real:], k[:, :real])
            of_padding = nn.functional.pad(of_padding, (0, k.shape[1] - real))
            weights = torch.cat([attention_weights(q[:, :real], k, key_bias=counts), of_padding], 2)
        return self.o_proj(torch.cat(attended, 1).flatten(2)), weights


class TiledEncoderLayer(CheckpointedLayer):
    """Pre-norm transformer block. If gated, both residual branches are scaled by tanh of a learned
    gate.
    """

    def __init__(self, config: TiledVisionSpec, gated: bool):
        super().__init__()
        self.input_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.self_attn = TiledAttention(config.hidden_size, config.attention_heads)
        self.post_attention_layernorm = LayerNorm(config.hidden_size, config.norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)
        self.gate_attn = nn.Parameter(torch.zeros(1)) if gated else None
        self.gate_ffn = nn.Parameter(torch.zeros(1)) if gated else None

    def forward(
        self,
        hidden_states: torch.Tensor,
        real: int,
        counts: torch.Tensor | None = None,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[images, S, hidden] -> (the same shape, probabilities or None); arguments as
        `TiledAttention.forward`.
        """
        attended, weights = self.self_attn(
            self.input_layernorm(hidden_states), real, counts, output_attentions
        )
        hidden_states = self._add(hidden_states, attended, self.gate_attn)
        return self._add(
            hidden_states, self.mlp(self.post_attention_layernorm(hidden_states)), self.gate_ffn
        ), weights

    @staticmethod
    def _add(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor | None) -> torch.Tensor:
        return x + y if gate is None else gated_add(x, y, gate)


class TiledEncoder(nn.Module):
    """A stack of layers for images with the same non-empty tiles."""

    def __init__(self, config: TiledVisionSpec, layers: int, gated: bool):
        super().__init__()
        self.layers = nn.ModuleList(TiledEncoderLayer(config, gated) for _ in range(layers))

    def forward(
        self,
        x: torch.Tensor,
        tile_mask: torch.Tensor,
        patches: int,
        wanted: Sequence[int],
        share_empty: bool,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
        """
        Args:
            x: [images, tiles, tokens, hidden].
            tile_mask: bool [tiles] on the CPU, False where the images' tiles are empty.
            patches: tokens per tile that are not padding.
            wanted: indices of further states to return: the number of layers before them.
            share_empty: compute equal empty tiles once. Exact, because tokens of empty tiles do
                not attend to each other.
            output_attentions: also return the probabilities.

        Returns:
            (the last state, with x's shape; the wanted states; per-layer probabilities [images,
            heads, S, S] float32 or None)
        """
        empty = ~tile_mask
        once = share_empty and int(empty.sum()) > 1
        once = once and bool((x[:, empty] == x[:, empty][:, :1]).all())
        order, back, real = order_tokens(x.shape[1:3], tile_mask, patches, once)
        order, back = order.to(x.device), back.to(x.device)
        counts = None
        if once:
            counts = x.new_zeros(1, len(order), dtype=torch.float32)
            counts[:, -x.shape[2] :] = math.log(int(empty.sum()))
        state = x.flatten(1, 2)[:, order]  # (images, S, hidden)
        states, weights = {0: state}, []
        for number, layer in enumerate(self.layers, 1):
            state, probabilities = layer(state, real, counts, output_attentions)
            weights.append(probabilities[:, :, back][..., back] if output_attentions else None)
            if number in wanted:
                states[number] = state
        return (
            state[:, back].view(x.shape),
            [states[number][:, back].view(x.shape) for number in wanted],
            weights,
        )


def order_tokens(
    shape: Sequence[int], tile_mask: torch.Tensor, patches: int, once: bool
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Order tokens for the attention, real ones first.

    Args:
        shape: (tiles, tokens per tile).
        tile_mask: bool [tiles], False where a tile is empty.
        patches: tokens per tile that are not padding.
        once: keep one empty tile to represent all.

    Returns:
        On the CPU: int64 [S], the token at each new index; int64 [tiles * tokens], the new index of
        each token; number of real tokens.
    """
    tiles, tokens = shape
    place = torch.arange(tiles * tokens, device="cpu").view(tiles, tokens)
    real, padding = place[tile_mask, :patches].flatten(), place[tile_mask, patches:].flatten()
    empty = place[~tile_mask]
    order = torch.cat([real, padding, (empty[:1] if once else empty).flatten()])
    back = torch.empty_like(place).flatten()
    back[order] = torch.arange(len(order), device="cpu")
    if once:
        back.view_as(place)[~tile_mask] = back[empty[0]]
    return order, back, len(real)
