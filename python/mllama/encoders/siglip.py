"""The SigLIP vision encoder: pixels -> one feature per patch, without a class token."""

import math

import torch
from torch import nn
from torch.nn.functional import interpolate

from mllama.config.features import FeatureChoice
from mllama.config.spec import ModelSpec, TiledVisionSpec, VisionSpec, count_patches
from mllama.encoders.output import EncoderOutput
from mllama.nn.attention import BidirectionalAttention
from mllama.nn.checkpointing import CheckpointedLayer
from mllama.nn.checks import check_floating
from mllama.nn.mlp import MLP
from mllama.nn.norm import LayerNorm
from mllama.ops.patch_embed import patch_embed


class PatchEmbedding(nn.Conv2d):
    """A convolution whose stride is its kernel size, computed as a matrix product per patch."""

    @classmethod
    def of(cls, config: VisionSpec | TiledVisionSpec, bias: bool = True) -> "PatchEmbedding":
        """Build an encoder's. The class itself is called as a convolution's, as PEFT needs it."""
        patch = config.patch_size
        return cls(config.num_channels, config.hidden_size, patch, patch, bias=bias)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, E, H // p, W // p], a convolution's layout, as PEFT needs it. Rows
        and columns left over are dropped.
        """
        p = self.kernel_size[0]
        height, width = (size // p for size in pixel_values.shape[-2:])
        pixel_values = pixel_values[..., : height * p, : width * p].to(self.weight.dtype)
        return patch_embed(pixel_values, self.weight, self.bias).mT.unflatten(-1, (height, width))


def interpolate_positions(table: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """Interpolate learned positions of a square of patches, [side * side, hidden], to [height *
    width, hidden].
    """
    side = math.isqrt(table.shape[0])
    if (height, width) == (side, side):
        return table
    square = table.T.view(1, -1, side, side)
    return interpolate(square, (height, width), mode="bicubic", align_corners=False).flatten(2)[0].T


class SiglipEmbeddings(nn.Module):
    """Patches plus learned positions, interpolated for images of other sizes than the config's."""

    def __init__(self, config: VisionSpec):
        super().__init__()
        self.positions = count_patches(config)
        self.patch_embedding = PatchEmbedding.of(config)
        self.position_embedding = nn.Embedding(self.positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, patches, hidden]."""
        patches = self.patch_embedding(pixel_values)
        table = self.position_embedding(torch.arange(self.positions, device=patches.device))
        return patches.flatten(2).mT + interpolate_positions(table, *patches.shape[-2:])


def check_pixels(pixel_values: torch.Tensor, config: VisionSpec, any_size: bool = False) -> None:
    """Reject pixels that do not fit the encoder.

    Raises:
        TypeError: pixel_values is not a floating tensor.
        ValueError: pixel_values is not [images, channels, image_size, image_size], or with
            `any_size` a side is smaller than a patch.
    """
    check_floating("pixel_values", pixel_values)
    wanted = (config.num_channels, config.image_size, config.image_size)
    if any_size and pixel_values.dim() == 4 and min(pixel_values.shape[2:]) >= config.patch_size:
        wanted = (config.num_channels, *pixel_values.shape[2:])
    if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != wanted:
        raise ValueError(
            f"pixel_values must be [images, {', '.join(map(str, wanted))}], "
            f"got {list(pixel_values.shape)}"
        )


class SiglipEncoderLayer(CheckpointedLayer):
    """Pre-norm transformer block."""

    def __init__(self, config: VisionSpec):
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = BidirectionalAttention(
            config.hidden_size, config.num_attention_heads, config.attention_dropout
        )
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, patches, hidden] -> (the same shape, probabilities or None)."""
        attended, weights = self.self_attn(self.layer_norm1(hidden_states), output_attentions)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layer_norm2(hidden_states)), weights


class SiglipEncoder(nn.Module):
    """A stack of layers."""

    def __init__(self, config: VisionSpec):
        super().__init__()
        self.layers = nn.ModuleList(
            SiglipEncoderLayer(config) for _ in range(config.num_hidden_layers)
        )


class SiglipImageEncoder(nn.Module):
    """Encoder of square images.

    Attributes:
        class_tokens: number of leading features that belong to no patch.
    """

    class_tokens = 0

    def __init__(self, config: VisionSpec):
        super().__init__()
        self.config = config
        self.embeddings = self.make_embeddings(config)
        self.encoder = SiglipEncoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def make_embeddings(self, config: VisionSpec) -> nn.Module:
        """Build the module that `embed` calls."""
        return SiglipEmbeddings(config)

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Input of the first layer: [B, C, S, S] -> [B, features, hidden]."""
        return self.embeddings(pixel_values)

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        final_norm: bool = True,
        depth: int | None = None,
        interpolate_pos_encoding: bool = False,
    ) -> EncoderOutput:
        """
        Args:
            pixel_values: float [images, channels, image_size, image_size]; cast to the encoder's
                dtype.
            output_hidden_states: also return the embeddings and every layer's output (before the
                final norm), layers + 1 tensors.
            output_attentions: also return every layer's probabilities [images, heads, features,
                features].
            final_norm: False skips the layer norm after the last layer.
            depth: number of layers to run. Default: all.
            interpolate_pos_encoding: accept any size, [images, channels, height, width].

        Returns:
            EncoderOutput with `last_hidden_state` [images, features, hidden], `hidden_states`,
            `attentions`.

        Raises:
            TypeError: pixel_values is not a floating tensor.
            ValueError: pixel_values has the wrong shape.
        """
        self.check(pixel_values, interpolate_pos_encoding)
        hidden_states = self.embed(pixel_values)
        states, attentions = [hidden_states], []
        for layer in self.encoder.layers[:depth]:
            hidden_states, weights = layer(hidden_states, output_attentions=output_attentions)
            attentions.append(weights)
            if output_hidden_states:
                states.append(hidden_states)
        return EncoderOutput(
            last_hidden_state=self.post_layernorm(hidden_states) if final_norm else hidden_states,
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )

    def read(
        self,
        pixel_values: torch.Tensor,
        aspect_ratio_ids: None,
        aspect_ratio_mask: None,
        choice: FeatureChoice,
        reference: str,
        output_attentions: bool = False,
    ) -> tuple[torch.Tensor, tuple | None]:
        """The chosen states, concatenated to [images, features, states * hidden], and attentions.

        The interface of all encoders; aspect ratios and reference do not apply here.
        """
        layers = choice.layers
        several = layers is not None and len(layers) > 1
        encoded = self(
            pixel_values,
            output_hidden_states=several,
            output_attentions=output_attentions,
            final_norm=layers is None,
            depth=None if layers is None else max(layers),
            interpolate_pos_encoding=choice.interpolate,
        )
        features = encoded.last_hidden_state
        if several:
            features = torch.cat([encoded.hidden_states[layer] for layer in layers], -1)
        if choice.skip_first:
            features = features[:, 1:]
        return features, encoded.attentions

    def check(self, pixel_values: torch.Tensor, interpolate_pos_encoding: bool = False) -> None:
        """Raise what `forward` would raise for these pixels, before computing anything."""
        check_pixels(pixel_values, self.config, any_size=interpolate_pos_encoding)

    def count_features(self, pixel_values: torch.Tensor) -> int:
        """Features per image for these pixels, class tokens included."""
        height, width = (size // self.config.patch_size for size in pixel_values.shape[-2:])
        return height * width + self.class_tokens

    @classmethod
    def peak_states(cls, spec: ModelSpec) -> int:
        """States of all tokens alive at once, beside a layer's own."""
        return 0 if spec.feature_layers is None else max(spec.feature_layers) + 1

    @staticmethod
    def count_encoded(vision: VisionSpec, images: int) -> int:
        """Number of images computed when `images` are given: all of them."""
        return images

    @staticmethod
    def sample(
        vision: VisionSpec, generator: torch.Generator, number: int
    ) -> dict[str, torch.Tensor]:
        """Random inputs of one image."""
        size = (vision.num_channels, vision.image_size, vision.image_size)
        return {"pixel_values": torch.randn(1, *size, generator=generator)}


class SiglipPoolingHead(nn.Module):
    """SigLIP's pooled feature: one learned query attends to the patches, followed by a feed-forward
    block.
    """

    def __init__(self, config: VisionSpec):
        super().__init__()
        self.probe = nn.Parameter(torch.randn(1, 1, config.hidden_size))
        self.attention = BidirectionalAttention(config.hidden_size, config.num_attention_heads)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = MLP(config.hidden_size, config.intermediate_size, config.hidden_act)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[B, patches, hidden] -> [B, hidden]."""
        pooled, _ = self.attention(
            self.probe.to(features.dtype).expand(features.shape[0], 1, -1), context=features
        )
        return (pooled + self.mlp(self.layernorm(pooled)))[:, 0]
