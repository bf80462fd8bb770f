"""Llama-3.2-Vision's encoder: tiled images -> features of the last and of intermediate layers.

It differs from other encoders in three points. Tile and position embeddings are selected by the
image's aspect ratio. The mask hides padding only from padding: real patches attend to every key,
empty tiles and padding tokens included, while those attend to real patches only. The last layer's
features are interleaved with those of intermediate layers.
"""

import torch
from torch import nn

from mllama.config.checks import check_reference
from mllama.config.features import FeatureChoice
from mllama.config.spec import ModelSpec, TiledVisionSpec, count_patches
from mllama.encoders.output import EncoderOutput
from mllama.encoders.siglip import PatchEmbedding
from mllama.encoders.tiled_layers import PositionEmbedding, TiledEncoder, TileEmbedding
from mllama.nn.checks import check_floating, check_integers
from mllama.nn.norm import LayerNorm

# The tokens of a tile are padded to a multiple of this; padding takes part in the attention.
_TOKENS_MULTIPLE = 8


class TiledImageEncoder(nn.Module):
    """Encoder of tiled images.

    Attributes:
        tokens_per_tile: features per tile.
        class_tokens: number of these that belong to no patch.
    """

    class_tokens = 1

    def __init__(self, config: TiledVisionSpec):
        super().__init__()
        self.config = config
        self.tokens_per_tile = count_patches(config) + 1
        self.class_embedding = nn.Parameter(
            torch.randn(config.hidden_size) * config.hidden_size**-0.5
        )
        self.patch_embedding = PatchEmbedding.of(config, bias=False)
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
            pixel_values: float [B, N, max_num_tiles, channels, image_size, image_size], N images
                per row; cast to the encoder's dtype.
            aspect_ratio_ids: int [B, N], 1 + the index of the image's (rows, columns) in
                `supported_aspect_ratios`; 0 means no image.
            aspect_ratio_mask: [B, N, max_num_tiles] of any dtype, zero where a tile is empty.
                Default: derived from the ids.
            reference: "meta" reads the inputs of `intermediate_layers_indices`, as the released
                weights were trained; "hf" their outputs, as transformers does.
            output_attentions: also return every layer's probabilities.

        Returns:
            EncoderOutput with `last_hidden_state` [B, N, max_num_tiles, patches + 1,
            vision_output_dim]; and `attentions`, per layer [B * N, heads, S, S] float32, where S
            counts the tokens of all tiles, each tile padded to a multiple of 8. With "meta" both
            are zero where there is no image.

        Raises:
            TypeError: an argument is not a tensor of the right kind.
            ValueError: a shape is wrong, or the reference is unknown.
            IndexError: an aspect ratio id is out of range.
        """
        self.check(pixel_values, aspect_ratio_ids, aspect_ratio_mask)
        check_reference(reference)
        if aspect_ratio_mask is None:
            aspect_ratio_mask = self._tile_mask(aspect_ratio_ids)
        ids = aspect_ratio_ids.flatten()  # (B * N,)
        tile_mask = (aspect_ratio_mask != 0).flatten(0, 1)  # (B * N, tiles)
        tokens = self._embed(pixel_values.flatten(0, 2), ids)
        features = tokens.new_zeros(
            *tile_mask.shape, self.tokens_per_tile, self.config.vision_output_dim
        )
        attentions = self._no_attentions(tokens) if output_attentions else None
        share_empty = not output_attentions and not self._trains_tiles(tokens)
        for chosen, used in group_images(ids, tile_mask, reference):
            features[chosen], weights = self._encode(
                tokens[chosen], ids[chosen], used, reference, share_empty, output_attentions
            )
            for layer, probabilities in zip(attentions or (), weights, strict=False):
                layer[chosen] = probabilities
        return EncoderOutput(
            last_hidden_state=features.unflatten(0, pixel_values.shape[:2]), attentions=attentions
        )

    def _no_attentions(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Zero probabilities for every layer, [B * N, heads, S, S]."""
        config, places = self.config, tokens.shape[1] * tokens.shape[2]
        shape = (len(tokens), config.attention_heads, places, places)
        layers = range(config.num_hidden_layers + config.num_global_layers)
        return tuple(tokens.new_zeros(shape, dtype=torch.float32) for _ in layers)

    def _trains_tiles(self, tokens: torch.Tensor) -> bool:
        """Whether per-tile parameters are trained; equal empty tiles then diverge."""
        tables = self.post_tile_positional_embedding.parameters()
        trained = tokens.requires_grad or any(table.requires_grad for table in tables)
        return trained and torch.is_grad_enabled()

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

        The interface of all encoders; `choice` does not apply here.
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
        """Raise what `forward` would raise for these inputs, before computing anything."""
        config, ids = self.config, aspect_ratio_ids
        check_floating("pixel_values", pixel_values)
        wanted = [config.max_num_tiles, config.num_channels, config.image_size, config.image_size]
        if pixel_values.dim() != 6 or list(pixel_values.shape[2:]) != wanted:
            raise ValueError(
                f"pixel_values must be [batch, images, {', '.join(map(str, wanted))}], "
                f"got {list(pixel_values.shape)}"
            )
        check_integers("aspect_ratio_ids", ids)
        if ids.shape != pixel_values.shape[:2]:
            raise ValueError(
                f"aspect_ratio_ids must be {list(pixel_values.shape[:2])}, one per image, "
                f"got {list(ids.shape)}"
            )
        if aspect_ratio_mask is not None and not isinstance(aspect_ratio_mask, torch.Tensor):
            kind = type(aspect_ratio_mask).__name__
            raise TypeError(f"aspect_ratio_mask must be a torch.Tensor or None, got {kind}")
        wanted = [*ids.shape, config.max_num_tiles]
        if aspect_ratio_mask is not None and list(aspect_ratio_mask.shape) != wanted:
            raise ValueError(
                f"aspect_ratio_mask must be {wanted}, one per tile, "
                f"got {list(aspect_ratio_mask.shape)}"
            )
        if torch.compiler.is_compiling() or ids.numel() == 0 or ids.is_meta:
            return
        low, high = (int(bound) for bound in ids.cpu().aminmax())
        if low < 0 or high > config.max_aspect_ratio_id:
            raise IndexError(
                f"aspect_ratio_ids must lie in 0 to {config.max_aspect_ratio_id}, "
                f"got {low} to {high}"
            )

    @classmethod
    def peak_states(cls, spec: ModelSpec) -> int:
        """States of all tokens alive at once, beside a layer's own: intermediate states, the
        features made of them, and the inputs of both stacks.
        """
        return 2 * len(spec.vision.intermediate_layers_indices) + 4

    @staticmethod
    def count_encoded(vision: TiledVisionSpec, images: int) -> int:
        """Number of tiles computed when `images` are given: those of whole images."""
        return -(-images // vision.max_num_tiles) * vision.max_num_tiles

    @staticmethod
    def sample(
        vision: TiledVisionSpec, generator: torch.Generator, number: int
    ) -> dict[str, torch.Tensor]:
        """Random inputs of one image with an aspect ratio of the spec's list; the first ones leave
        tiles empty.
        """
        number = min(number, len(vision.supported_aspect_ratios) - 1)
        rows, columns = vision.supported_aspect_ratios[number]
        tiles, size = vision.max_num_tiles, vision.image_size
        tile_mask = (torch.arange(tiles) < rows * columns).long()[None, None]  # (1, 1, tiles)
        pixels = torch.randn(1, 1, tiles, vision.num_channels, size, size, generator=generator)
        return {
            "pixel_values": pixels * tile_mask[..., None, None, None],
            "aspect_ratio_ids": torch.tensor([[number + 1]]),
            "aspect_ratio_mask": tile_mask,
        }

    def _tile_mask(self, ids: torch.Tensor) -> torch.Tensor:
        """bool [B, N, tiles]: the leading tiles that each aspect ratio fills; one tile for id 0, as
        in processors.
        """
        counts = torch.tensor(
            [1] + [rows * columns for rows, columns in self.config.supported_aspect_ratios],
            device=ids.device,
        )
        return torch.arange(self.config.max_num_tiles, device=ids.device) < counts[ids].unsqueeze(
            -1
        )

    def _embed(self, tiles: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[images * tiles, channels, size, size] -> [images, tiles, tokens, hidden], with tokens
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
        tile_mask: torch.Tensor,
        reference: str,
        share_empty: bool,
        output_attentions: bool,
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Encode images with the same non-empty tiles: tokens [images, tiles, tokens, hidden] ->
        features, and every layer's probabilities.
        """
        shift = 0 if reference == "meta" else 1
        wanted = [index + shift for index in self.config.intermediate_layers_indices]
        x, between, weights = self.transformer(
            x, tile_mask, self.tokens_per_tile, wanted, share_empty, output_attentions
        )
        x = self.post_tile_positional_embedding(self.layernorm_post(x), ids)
        x, _, more = self.global_transformer(
            x, tile_mask, self.tokens_per_tile, (), share_empty, output_attentions
        )
        patches = slice(self.tokens_per_tile)
        features = [x[:, :, patches]]
        if between:
            features.append(
                torch.stack([state[:, :, patches] for state in between], -1).flatten(-2)
            )
        return torch.cat(features, -1), weights + more


def group_images(
    ids: torch.Tensor, tile_mask: torch.Tensor, reference: str
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Group images by their non-empty tiles, so that real tokens have the same positions.

    With "meta", padding images of rows with fewer images are left out: nothing attends to them.
    With "hf", text before the first image attends to them.

    Args:
        ids: int [images], 0 where there is no image.
        tile_mask: bool [images, tiles].
        reference: "meta" or "hf".

    Returns:
        Per group: int64 indices of its images, and bool [tiles] on the CPU, its non-empty tiles.
    """
    host = tile_mask.cpu()
    shown = torch.arange(len(ids), device="cpu")
    if reference == "meta":
        shown = shown[ids.cpu() != 0]
    kinds, kind = host[shown].unique(dim=0, return_inverse=True)
    groups = ((shown[kind == number], used) for number, used in enumerate(kinds))
    return [(chosen.to(ids.device), used) for chosen, used in groups]
