"""Llama-3.2-Vision's encoder: tiles of images -> features, from layers over all tiles of an image
and from some layers on the way.

Three things are unlike other encoders. Tiles and their positions are told by the image's aspect
ratio, from tables. The mask hides padding only from padding: real patches see every key, empty
tiles and padding tokens too, while those see real patches only. And the features put the last
layer's beside those of chosen layers on the way, interleaved.
"""

import torch
from torch import nn

from mllama.config.checks import check_reference
from mllama.config.features import FeatureChoice
from mllama.config.spec import ModelSpec, TiledVisionSpec
from mllama.encoders.output import EncoderOutput
from mllama.encoders.siglip import PatchEmbedding
from mllama.encoders.tiled_layers import PositionEmbedding, TiledEncoder, TileEmbedding
from mllama.nn.norm import LayerNorm

# every tile's tokens are padded to a multiple of it; padding tokens take part in the attention
_TOKENS_MULTIPLE = 8


class TiledImageEncoder(nn.Module):
    """Encoder of images in tiles.

    Attributes:
        tokens_per_tile: features of a tile.
        class_tokens: how many of them are no patch's.
    """

    class_tokens = 1

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
            pixel_values: float [B, N, max_num_tiles, channels, image_size, image_size], N images
                a row; cast to the encoder's dtype.
            aspect_ratio_ids: int [B, N], 1 + the place of the image's (rows, columns) among
                `supported_aspect_ratios`; 0 is no image.
            aspect_ratio_mask: [B, N, max_num_tiles] of any dtype, zero where a tile is empty; None
                is as the ids say.
            reference: "meta" takes the inputs of `intermediate_layers_indices`, as the released
                weights were trained; "hf" their outputs, as transformers does.
            output_attentions: also return every layer's probabilities.

        Returns:
            EncoderOutput with `last_hidden_state` [B, N, max_num_tiles, patches + 1,
            vision_output_dim], and `attentions`, of every layer [B * N, heads, S, S] float32 where
            S counts the tokens of all tiles, each tile's padded to a multiple of 8. With "meta"
            both are zero where there is no image.

        Raises:
            TypeError: an argument is no tensor, or of another kind.
            ValueError: another shape, or a reference that is not known.
            IndexError: an aspect ratio id that the tables lack.
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
        for chosen, filled in group_images(ids, tile_mask, reference):
            features[chosen], weights = self._encode(
                tokens[chosen], ids[chosen], filled, reference, share_empty, output_attentions
            )
            for layer, probabilities in zip(attentions or (), weights, strict=False):
                layer[chosen] = probabilities
        return EncoderOutput(
            last_hidden_state=features.unflatten(0, pixel_values.shape[:2]), attentions=attentions
        )

    def _no_attentions(self, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Zeros for every layer's probabilities, [B * N, heads, S, S]."""
        config, places = self.config, tokens.shape[1] * tokens.shape[2]
        shape = (len(tokens), config.attention_heads, places, places)
        layers = range(config.num_hidden_layers + config.num_global_layers)
        return tuple(tokens.new_zeros(shape, dtype=torch.float32) for _ in layers)

    def _trains_tiles(self, tokens: torch.Tensor) -> bool:
        """Whether something of each tile is trained: then equal empty tiles become different."""
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
        config, ids = self.config, aspect_ratio_ids
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            raise TypeError(
                f"pixel_values must be a floating torch.Tensor, got {_kind(pixel_values)}"
            )
        wanted = [config.max_num_tiles, config.num_channels, config.image_size, config.image_size]
        if pixel_values.dim() != 6 or list(pixel_values.shape[2:]) != wanted:
            raise ValueError(
                f"pixel_values must be [batch, images, {', '.join(map(str, wanted))}], "
                f"got {list(pixel_values.shape)}"
            )
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(
                f"aspect_ratio_ids must be an int64 or int32 torch.Tensor, got {_kind(ids)}"
            )
        if ids.shape != pixel_values.shape[:2]:
            raise ValueError(
                f"aspect_ratio_ids must be {list(pixel_values.shape[:2])}, one per image, "
                f"got {list(ids.shape)}"
            )
        if aspect_ratio_mask is not None and not isinstance(aspect_ratio_mask, torch.Tensor):
            raise TypeError(
                f"aspect_ratio_mask must be a torch.Tensor or None, got {_kind(aspect_ratio_mask)}"
            )
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
        """States of all tokens that are alive at once beside a layer's own: those on the way,
        features made of them, what both stacks start from.
        """
        return 2 * len(spec.vision.intermediate_layers_indices) + 4

    @staticmethod
    def count_encoded(vision: TiledVisionSpec, images: int) -> int:
        """Tiles that are computed where so many are filled: those of whole images."""
        return -(-images // vision.max_num_tiles) * vision.max_num_tiles

    @staticmethod
    def sample(
        vision: TiledVisionSpec, generator: torch.Generator, number: int
    ) -> dict[str, torch.Tensor]:
        """Random inputs, of one image in an aspect ratio of the spec's list; the first ones leave
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
        """bool [B, N, tiles]: the first tiles of each image, as many as its aspect ratio has; of no
        image one, as processors have it.
        """
        counts = torch.tensor(
            [1] + [rows * columns for rows, columns in self.config.supported_aspect_ratios],
            device=ids.device,
        )
        return torch.arange(self.config.max_num_tiles, device=ids.device) < counts[ids].unsqueeze(
            -1
        )

    def _embed(self, tiles: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """[images * tiles, channels, size, size] -> [images, tiles, tokens, hidden], tokens
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
        """Pictures with the same tiles filled: tokens [images, tiles, tokens, hidden] ->
        features, and weights of every layer.
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
    """Images with the same tiles filled go together: their real tokens stand at the same places.

    By Meta's rule nothing attends to the places of rows with fewer images, so that these are left
    out; with "hf", text before the first image does.

    Args:
        ids: int [images], 0 where there is none.
        tile_mask: bool [images, tiles].
        reference: "meta" or "hf".

    Returns:
        For each group the indices of its images, int64, and its tiles, bool [tiles] on the CPU.
    """
    host = tile_mask.cpu()
    shown = torch.arange(len(ids), device="cpu")
    if reference == "meta":
        shown = shown[ids.cpu() != 0]
    kinds, kind = host[shown].unique(dim=0, return_inverse=True)
    groups = ((shown[kind == number], filled) for number, filled in enumerate(kinds))
    return [(chosen.to(ids.device), filled) for chosen, filled in groups]


def _kind(value) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
