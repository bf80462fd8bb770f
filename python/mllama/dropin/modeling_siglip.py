"""`modeling_siglip` of older PaliGemma scripts: SigLIP whose modules take one config and return
bare tensors, under Hugging Face's names.

They are the package's tower, read one part at a time: the operators underneath, GELU in its tanh
form, pixels cast to the weights' dtype.
"""

import torch
from torch import nn

from mllama.encoders import siglip as towers
from mllama.hf.configs import MllamaVisionConfig
from mllama.nn.mlp import MLP

__all__ = [
    "SiglipAttention",
    "SiglipEncoder",
    "SiglipEncoderLayer",
    "SiglipMLP",
    "SiglipVisionConfig",
    "SiglipVisionEmbeddings",
    "SiglipVisionModel",
    "SiglipVisionTransformer",
]


class SiglipVisionConfig(MllamaVisionConfig):
    """The tower's sizes, by place or by name; further names are kept as attributes.

    Args:
        hidden_size: width of a feature.
        intermediate_size: width inside a feed-forward block.
        num_hidden_layers, num_attention_heads: layers, and heads of each, which share hidden_size.
        num_channels: of a picture.
        image_size, patch_size: edges in pixels; what is left over at the right and at the bottom is
            not seen.
        layer_norm_eps: of every norm.
        attention_dropout: chance that training leaves out a probability.
        num_image_tokens: placeholders per picture, for the scripts' own use.

    Raises:
        ValueError: a size that is not a positive integer, or sizes that do not go together; the
            text names the field.
    """

    def __init__(
        self,
        hidden_size: int = 768,
        intermediate_size: int = 3072,
        num_hidden_layers: int = 12,
        num_attention_heads: int = 12,
        num_channels: int = 3,
        image_size: int = 224,
        patch_size: int = 16,
        layer_norm_eps: float = 1e-6,
        attention_dropout: float = 0.0,
        num_image_tokens: int | None = None,
        **kwargs,
    ):
        super().__init__(
            hidden_size=hidden_size,
            intermediate_size=intermediate_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_channels=num_channels,
            image_size=image_size,
            patch_size=patch_size,
            layer_norm_eps=layer_norm_eps,
            attention_dropout=attention_dropout,
            num_image_tokens=num_image_tokens,
            **kwargs,
        )


class SiglipVisionEmbeddings(towers.SiglipEmbeddings):
    """Patches plus a learned position each.

    Attributes: config, embed_dim, image_size, patch_size, num_patches (also num_positions),
    position_ids [1, num_patches].
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.config = config
        self.embed_dim, self.image_size, self.patch_size = (
            config.hidden_size,
            config.image_size,
            config.patch_size,
        )
        self.num_patches = self.num_positions = (config.image_size // config.patch_size) ** 2
        self.register_buffer("position_ids", torch.arange(self.num_patches)[None], persistent=False)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, image_size, image_size] -> [B, patches, hidden_size].

        Raises:
            TypeError: pixel_values is no floating tensor.
            ValueError: pixel_values has another shape.
        """
        towers.check_pixels(pixel_values, self.config)
        return super().forward(pixel_values)


class SiglipAttention(towers.SiglipAttention):
    """Every patch sees every other.

    Attributes: config, embed_dim, num_heads, head_dim, scale, dropout.
    """

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.config = config
        self.embed_dim, self.num_heads = config.hidden_size, config.num_attention_heads
        self.scale = self.head_dim**-0.5

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, P, hidden_size] -> (the same shape, probabilities [B, heads, P, P] whose rows sum to
        1, or None where not asked for).
        """
        output, weights = super().forward(hidden_states, output_attentions)
        return output, weights if weights is None else weights.to(output.dtype)


class SiglipMLP(MLP):
    """fc2(gelu(fc1(x))), GELU in its tanh form unless the config names another activation."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(
            config.hidden_size,
            config.intermediate_size,
            getattr(config, "hidden_act", "gelu_pytorch_tanh"),
        )
        self.config = config


class SiglipEncoderLayer(towers.SiglipEncoderLayer):
    """Pre-norm transformer block."""

    attention_class, mlp_class = SiglipAttention, SiglipMLP

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, P, hidden_size] -> the same shape."""
        return super().forward(hidden_states)[0]


class SiglipEncoder(towers.SiglipEncoder):
    """The layers."""

    layer_class = SiglipEncoderLayer

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.config = config

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """[B, P, hidden_size] -> the same shape."""
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


class SiglipVisionTransformer(towers.SiglipVisionTower):
    """Embeddings, layers and the final norm."""

    embeddings_class, encoder_class = SiglipVisionEmbeddings, SiglipEncoder

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, image_size, image_size] -> [B, patches, hidden_size]; raises as
        `SiglipVisionEmbeddings`.
        """
        return self.post_layernorm(self.encoder(self.embeddings(pixel_values)))


class SiglipVisionModel(nn.Module):
    """The tower under the name that checkpoints give it, `vision_model`."""

    transformer_class: type[nn.Module] = SiglipVisionTransformer

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.vision_model = self.transformer_class(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, image_size, image_size] -> [B, patches, hidden_size], a bare tensor; raises
        as `SiglipVisionEmbeddings`.
        """
        return self.vision_model(pixel_values)
