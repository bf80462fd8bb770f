"""Llama-3.2-Vision's tower: tiles of pictures -> features, from layers over all tiles of a picture
and from some layers on the way.

Three things are unlike other towers. Tiles and their positions are told by the picture's
arrangement of tiles (aspect ratio), from tables.
The mask hides padding only from padding: real patches see every key, empty tiles and padding tokens
too, while those see real patches only. And the features put the last layer's beside those of chosen
layers on the way, interleaved.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from mllama.config.checks import check_reference
from mllama.config.features import FeatureChoice
from mllama.config.spec import TiledVisionSpec
from mllama.encoders.output import EncoderOutput
from mllama.encoders.siglip import PatchEmbedding
from mllama.nn.attention import split_heads
from mllama.nn.checkpointing import CheckpointedLayer
from mllama.nn.gate import gated_add
from mllama.nn.mlp import MLP
from mllama.nn.norm import LayerNorm
from mllama.ops.attention import attention, attention_weights

# every tile's tokens are padded to a multiple of it; padding tokens take part in the attention
_TOKENS_MULTIPLE = 8


class TileEmbedding(nn.Module):
    """A vector for every tile, by the picture's arrangement; id 0 is no picture."""

    def __init__(self, config: TiledVisionSpec):
        super().__init__()
        self.embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * config.hidden_size
        )
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, aspect_ratio_ids: torch.Tensor) -> torch.Tensor:
        """x: [pictures, tiles, tokens, hidden], aspect_ratio_ids: int [pictures] -> x plus its
        tiles' vectors.
        """
        vectors = self.embedding(aspect_ratio_ids).float() * self.gate.float().tanh()
        return x + vectors.unflatten(1, (x.shape[1], 1, -1)).to(x.dtype)


class PositionEmbedding(nn.Module):
    """A vector for every token of a tile, weighed by a gate against one for every token of every
    tile.
    """

    def __init__(self, config: TiledVisionSpec):
        super().__init__()
        tokens = (config.image_size // config.patch_size) ** 2 + 1
        self.embedding = nn.Parameter(
            torch.randn(tokens, config.hidden_size) * config.hidden_size**-0.5
        )
        self.tile_embedding = nn.Embedding(
            config.max_aspect_ratio_id + 1, config.max_num_tiles * tokens * config.hidden_size
        )
        self.gate = nn.Parameter(torch.zeros(1))

    def forward(self, x: torch.Tensor, aspect_ratio_ids: torch.Tensor) -> torch.Tensor:
        """x: [pictures, tiles, tokens, hidden], aspect_ratio_ids: int [pictures] -> x plus
        positions.
        """
        gate = self.gate.float().tanh()
        own = self.tile_embedding(aspect_ratio_ids).view(x.shape)
        return x + ((1 - gate) * self.embedding.float() + gate * own.float()).to(x.dtype)


class TiledAttention(nn.Module):
    """Attention under the tower's mask."""

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
            x: [pictures, S, hidden_size], real tokens before padding.
            real: how many are real: they see all S, the others these only.
            counts: float32 [1, S], the logarithm of how many equal tokens each stands for; None is
                one each.
            output_attentions: also return the probabilities.

        Returns:
            (the same shape, probabilities [pictures, heads, S, S] float32 or None)
        """
        q, k, v = (
            split_heads(projection(x), self.head_dim)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
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
    """Pre-norm transformer block; a gated one scales what both halves add by tanh of a learned
    number.
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
        """[pictures, S, hidden] -> (the same shape, probabilities or None); arguments as
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
    """A stack of layers over pictures with the same tiles filled."""

    def __init__(self, config: TiledVisionSpec, layers: int, gated: bool):
        super().__init__()
        self.layers = nn.ModuleList(TiledEncoderLayer(config, gated) for _ in range(layers))

    def forward(
        self,
        x: torch.Tensor,
        filled: torch.Tensor,
        patches: int,
        wanted: Sequence[int],
        alike: bool,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor | None]]:
        """
        Args:
            x: [pictures, tiles, tokens, hidden].
            filled: bool [tiles], False where all pictures' tiles are empty.
            patches: tokens of a tile that are not padding.
            wanted: further states to return, by how many layers come before them.
            alike: empty tiles that are equal stay so and may be computed once: exact, since no
                token of them sees another.
            output_attentions: also return the probabilities.

        Returns:
            (the last state, of x's shape; the wanted ones; every layer's probabilities [pictures,
            heads, S, S] float32 or None)
        """
        tiles, tokens = x.shape[1:3]
        place = torch.arange(tiles * tokens, device=x.device).view(tiles, tokens)
        real, padding, empty = (
            place[filled, :patches].flatten(),
            place[filled, patches:].flatten(),
            place[~filled],
        )
        once = alike and len(empty) > 1 and bool((x[:, ~filled] == x[:, ~filled][:, :1]).all())
        order = torch.cat(
            [real, padding, (empty[:1] if once else empty).flatten()]
        )  # the attention wants real tokens first
        back = torch.empty_like(place).flatten()
        back[order] = torch.arange(len(order), device=x.device)
        counts = None
        if once:
            back.view_as(place)[~filled] = back[empty[0]]
            counts = x.new_zeros(1, len(order), dtype=torch.float32)
            counts[:, -tokens:] = math.log(len(empty))

        state = x.flatten(1, 2)[:, order]
        kept, weights = {0: state}, []
        for number, layer in enumerate(self.layers, 1):
            state, seen = layer(state, len(real), counts, output_attentions)
            weights.append(seen[:, :, back][..., back] if output_attentions else None)
            if number in wanted:
                kept[number] = state
        return (
            state[:, back].view(x.shape),
            [kept[number][:, back].view(x.shape) for number in wanted],
            weights,
        )


class TiledVisionTower(nn.Module):
    """Encoder of tiled pictures.

    Args:
        config: transformers' `MllamaVisionConfig`.
    """

    has_class_token = True

    def __init__(self, config: TiledVisionSpec):
        super().__init__()
        self.config = config
        self.tokens_per_tile = (config.image_size // config.patch_size) ** 2 + 1
        self.class_embedding = nn.Parameter(
            torch.randn(config.hidden_size) * config.hidden_size**-0.5
        )
        self.patch_embedding = PatchEmbedding(
            config.num_channels,
            config.hidden_size,
            config.patch_size,
            config.patch_size,
            bias=False,
        )
        self.gated_positional_embedding = PositionEmbedding(config)
        self.pre_tile_positional_embedding = TileEmbedding(config)
        self.post_tile_positional_embedding = TileEmbedding(config)
        self.layernorm_pre = LayerNorm(config.hidden_size, 1e-5)
        self.layernorm_post = LayerNorm(config.hidden_size, 1e-5)
        self.transformer = TiledEncoder(config, config.num_hidden_layers, gated=False)
        self.global_transformer = TiledEncoder(config, config.num_global_layers, gated=True)

    def forward(
        self,
        pixel_values: torch.Tensor,
        aspect_ratio_ids: torch.Tensor,
        aspect_ratio_mask: torch.Tensor | None = None,
        reference: str = "meta",
        output_attentions: bool = False,
    ) -> EncoderOutput:
        """
        Args:
            pixel_values: float [B, N, max_num_tiles, channels, image_size, image_size], N pictures
                a row; cast to the tower's dtype.
            aspect_ratio_ids: int [B, N], 1 + the place of the picture's (rows, columns) among
                `supported_aspect_ratios`; 0 is no picture.
            aspect_ratio_mask: [B, N, max_num_tiles] of any dtype, zero where a tile is empty; None
                is as the ids say.
            reference: "meta" takes the inputs of `intermediate_layers_indices`, as the released
                weights were trained; "hf" their outputs, as transformers does.
            output_attentions: also return every layer's probabilities.

        Returns:
            EncoderOutput with `last_hidden_state` [B, N, max_num_tiles, patches + 1,
            vision_output_dim], and `attentions`, of every layer [B * N, heads, S, S] float32 where
            S counts the tokens of all tiles, each tile's padded to a multiple of 8. With "meta"
            both are zero where there is no picture.

        Raises:
            TypeError: an argument is no tensor, or of another kind.
            ValueError: another shape, or a reference that is not known.
            IndexError: an aspect ratio id that the tables lack.
        """
        self.check(pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        check_reference(reference)
        if aspect_ratio_mask is None:
            aspect_ratio_mask = self._filled(aspect_ratio_ids)
        ids, filled = aspect_ratio_ids.flatten(), (aspect_ratio_mask != 0).flatten(0, 1)
        tokens = self._embed(pixel_values.flatten(0, 2), ids)
        # Empty tiles go different ways only where something of a tile's own is trained;
        # probabilities are asked for one by one.
        trained = tokens.requires_grad or any(
            table.requires_grad for table in self.post_tile_positional_embedding.parameters()
        )
        alike = not (output_attentions or (trained and torch.is_grad_enabled()))
        # By Meta's rule nothing attends to the places of rows with fewer pictures; with "hf", text
        # before the first picture does.
        shown = (
            ids.nonzero().flatten()
            if reference == "meta"
            else torch.arange(len(ids), device=ids.device)
        )
        # Pictures with the same tiles filled go together: their real tokens stand at the same
        # places.
        kinds, kind = filled[shown].unique(dim=0, return_inverse=True)
        features = tokens.new_zeros(
            *filled.shape, self.tokens_per_tile, self.config.vision_output_dim
        )
        attentions = None
        if output_attentions:
            layers, places = (
                self.config.num_hidden_layers + self.config.num_global_layers,
                tokens.shape[1] * tokens.shape[2],
            )
            shape = (len(ids), self.config.attention_heads, places, places)
            attentions = tuple(tokens.new_zeros(shape, dtype=torch.float32) for _ in range(layers))
        for number in range(len(kinds)):
            chosen = shown[kind == number]
            features[chosen], weights = self._encode(
                tokens[chosen], ids[chosen], kinds[number], reference, alike, output_attentions
            )
            for layer, seen in zip(attentions or (), weights, strict=False):
                layer[chosen] = seen
        return EncoderOutput(
            last_hidden_state=features.unflatten(0, pixel_values.shape[:2]), attentions=attentions
        )

    def read(
        self,
        pixel_values: torch.Tensor,
        aspect_ratio_ids: torch.Tensor,
        aspect_ratio_mask: torch.Tensor | None,
        choice: FeatureChoice,
        reference: str,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, tuple | None]:
        """All features of a row, [B, N * tiles * (patches + 1), vision_output_dim], and attentions.

        The arguments are those of every encoder's `read`; this one's states are fixed.
        """
        encoded = self(
            pixel_values, aspect_ratio_ids, aspect_ratio_mask, reference, output_attentions
        )
        return encoded.last_hidden_state.flatten(1, 3), encoded.attentions

    def check(
        self,
        pixel_values: torch.Tensor,
        aspect_ratio_ids: torch.Tensor,
        aspect_ratio_mask: torch.Tensor | None = None,
    ) -> None:
        """Raise what `forward` would raise for this input, before any work."""
        config = self.config
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            raise TypeError(
                f"pixel_values must be a floating torch.Tensor, got {_kind(pixel_values)}"
            )
        wanted = [config.max_num_tiles, config.num_channels, config.image_size, config.image_size]
        if pixel_values.dim() != 6 or list(pixel_values.shape[2:]) != wanted:
            raise ValueError(
                f"pixel_values must be [batch, pictures, {', '.join(map(str, wanted))}], got {list(pixel_values.shape)}"
            )
        batch, pictures = pixel_values.shape[:2]
        if not isinstance(aspect_ratio_ids, torch.Tensor) or aspect_ratio_ids.dtype not in (
            torch.int64,
            torch.int32,
        ):
            raise TypeError(
                f"aspect_ratio_ids must be an int64 or int32 torch.Tensor, got {_kind(aspect_ratio_ids)}"
            )
        if list(aspect_ratio_ids.shape) != [batch, pictures]:
            raise ValueError(
                f"aspect_ratio_ids must be [{batch}, {pictures}], one per picture, got {list(aspect_ratio_ids.shape)}"
            )
        if aspect_ratio_mask is not None and not isinstance(aspect_ratio_mask, torch.Tensor):
            raise TypeError(
                f"aspect_ratio_mask must be a torch.Tensor or None, got {_kind(aspect_ratio_mask)}"
            )
        wanted = [batch, pictures, config.max_num_tiles]
        if aspect_ratio_mask is not None and list(aspect_ratio_mask.shape) != wanted:
            raise ValueError(
                f"aspect_ratio_mask must be {wanted}, one per tile, got {list(aspect_ratio_mask.shape)}"
            )
        if (
            torch.compiler.is_compiling()
            or aspect_ratio_ids.numel() == 0
            or aspect_ratio_ids.is_meta
        ):
            return
        low, high = (int(bound) for bound in aspect_ratio_ids.aminmax())
        if low < 0 or high > config.max_aspect_ratio_id:
            raise IndexError(
                f"aspect_ratio_ids must lie in 0 to {config.max_aspect_ratio_id}, got {low} to {high}"
            )

    def _filled(self, ids: torch.Tensor) -> torch.Tensor:
        """The first tiles of each picture, as many as its arrangement has; of no picture one, as
        processors have it.
        """
        counts = torch.tensor(
            [1] + [rows * columns for rows, columns in self.config.supported_aspect_ratios],
            device=ids.device,
        )
        return torch.arange(self.config.max_num_tiles, device=ids.device) < counts[ids].unsqueeze(
            -1
        )

    def _embed(self, tiles: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[pictures * tiles, channels, size, size] -> [pictures, tiles, tokens, hidden], tokens
        padded to a multiple of 8.
        """
        x = self.patch_embedding(tiles).flatten(2).mT.unflatten(0, (-1, self.config.max_num_tiles))
        x = self.pre_tile_positional_embedding(x, ids)
        x = torch.cat([self.class_embedding.expand(*x.shape[:2], 1, -1), x], 2)
        x = self.layernorm_pre(self.gated_positional_embedding(x, ids))
        return nn.functional.pad(x, (0, 0, 0, -self.tokens_per_tile % _TOKENS_MULTIPLE))

    def _encode(
        self,
        x: torch.Tensor,
        ids: torch.Tensor,
        filled: torch.Tensor,
        reference: str,
        alike: bool,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Pictures with the same tiles filled: tokens [pictures, tiles, tokens, hidden] ->
        features, and weights of every layer.
        """
        shift = 0 if reference == "meta" else 1
        wanted = [index + shift for index in self.config.intermediate_layers_indices]
        x, between, weights = self.transformer(
            x, filled, self.tokens_per_tile, wanted, alike, output_attentions
        )
        x = self.post_tile_positional_embedding(self.layernorm_post(x), ids)
        x, _, more = self.global_transformer(
            x, filled, self.tokens_per_tile, (), alike, output_attentions
        )
        patches = slice(self.tokens_per_tile)
        features = [x[:, :, patches]]
        if between:
            features.append(
                torch.stack([state[:, :, patches] for state in between], -1).flatten(-2)
            )
        return torch.cat(features, -1), weights + more


def _kind(value) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
