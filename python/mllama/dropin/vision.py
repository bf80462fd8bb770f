"""SigLIP on the package's operators, which returns bare tensors.

`siglip` and `modeling_siglip` of older scripts: they differ in the names of a layer's norms
(`layernorm1`, `layer_norm1`) and of the tower's parts (`embedding`, `layernorm` and `embeddings`,
`post_layernorm`).
"""

from typing import Any

import torch
from torch import nn
from torch.nn.functional import dropout

from mllama import ops
from mllama.hf.configs import MllamaVisionConfig
from mllama.nn.activation import ACTIVATIONS


class SiglipVisionConfig(MllamaVisionConfig):
    """SigLIP's sizes by name, SigLIP-base's by default; other names are stored as attributes."""

    def __init__(self, *, num_image_tokens: int | None = None, **kwargs: Any):
        super().__init__(num_image_tokens=num_image_tokens, **kwargs)


class SiglipVisionEmbeddings(nn.Module):
    """Patches plus learned positions."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config, self.embed_dim = config, config.hidden_size
        self.image_size, self.patch_size = config.image_size, config.patch_size
        self.num_patches = self.num_positions = (config.image_size // config.patch_size) ** 2
        channels, patch = config.num_channels, config.patch_size
        self.patch_embedding = nn.Conv2d(channels, config.hidden_size, patch, stride=patch)
        self.position_embedding = nn.Embedding(self.num_patches, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, image_size, image_size], cast to the weights' dtype, -> [B, patches, hidden].

        Raises:
            TypeError: pixel_values are not floating. ValueError: another shape.
        """
        if not isinstance(pixel_values, torch.Tensor) or not pixel_values.is_floating_point():
            raise TypeError("pixel_values must be a floating torch.Tensor")
        wanted = (self.config.num_channels, self.image_size, self.image_size)
        if pixel_values.dim() != 4 or tuple(pixel_values.shape[1:]) != wanted:
            found = list(pixel_values.shape)
            raise ValueError(f"pixel_values must be {['images', *wanted]}, got {found}")
        edge = self.image_size // self.patch_size * self.patch_size  # the rest is cut off
        weight, bias = self.patch_embedding.weight, self.patch_embedding.bias
        pixels = pixel_values[..., :edge, :edge].to(weight.dtype)
        return ops.patch_embed(pixels, weight, bias) + self.position_embedding.weight


class SiglipAttention(nn.Module):
    """Every patch attends to all patches."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config, self.embed_dim = config, config.hidden_size
        self.num_heads = config.num_attention_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.scale, self.dropout = self.head_dim**-0.5, config.attention_dropout
        self.q_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.k_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.v_proj = nn.Linear(self.embed_dim, self.embed_dim)
        self.out_proj = nn.Linear(self.embed_dim, self.embed_dim)

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, P, hidden] -> (the same shape, probabilities [B, heads, P, P] or None)."""
        q, k, v = (
            projection(hidden_states).unflatten(-1, (self.num_heads, self.head_dim))  # (B, P, H, D)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        dropping = self.training and self.dropout > 0
        weights = None
        if output_attentions or dropping:
            weights = ops.attention_weights(q, k).to(v.dtype)
        if dropping:
            out = torch.einsum("bhts,bshd->bthd", dropout(weights, self.dropout), v)
        else:
            out = ops.attention(q, k, v)
        return self.out_proj(out.flatten(2)), weights if output_attentions else None


class SiglipMLP(nn.Module):
    """fc2(gelu(fc1(x))), GELU in the tanh form that the checkpoints were trained with."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACTIVATIONS[getattr(config, "hidden_act", "gelu_pytorch_tanh")]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden] -> the same shape."""
        return self.fc2(self.act(self.fc1(x)))


class SiglipEncoderLayer(nn.Module):
    """Pre-norm transformer block of `modeling_siglip`: layer_norm1, self_attn, layer_norm2, mlp."""

    norms = ("layer_norm1", "layer_norm2")

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        first, second = self.norms
        self.add_module(first, nn.LayerNorm(config.hidden_size, config.layer_norm_eps))
        self.self_attn = SiglipAttention(config)
        self.add_module(second, nn.LayerNorm(config.hidden_size, config.layer_norm_eps))
        self.mlp = SiglipMLP(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, P, hidden] -> the same shape."""
        first, second = (getattr(self, name) for name in self.norms)
        attended, _ = self.self_attn(first(hidden_states), output_attentions=False)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(second(hidden_states))


class SiglipVisionEncoder(SiglipEncoderLayer):
    """One layer of `siglip`, which calls it so: layernorm1, self_attn, layernorm2, mlp."""

    norms = ("layernorm1", "layernorm2")


class SiglipEncoder(nn.Module):
    """The layers, of `modeling_siglip`."""

    layer_class: type[SiglipEncoderLayer] = SiglipEncoderLayer

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(self.layer_class(config) for _ in layers)

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """[B, P, hidden] -> the same shape."""
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


class OlderSiglipEncoder(SiglipEncoder):
    """The layers, of `siglip`."""

    layer_class = SiglipVisionEncoder


class SiglipVisionTransformer(nn.Module):
    """Embeddings, layers and the final norm, of `modeling_siglip`."""

    parts = ("embeddings", "post_layernorm")
    encoder_class: type[SiglipEncoder] = SiglipEncoder

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config = config
        embeddings, norm = self.parts
        self.add_module(embeddings, SiglipVisionEmbeddings(config))
        self.encoder = self.encoder_class(config)
        self.add_module(norm, nn.LayerNorm(config.hidden_size, config.layer_norm_eps))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, image_size, image_size] -> [B, patches, hidden]."""
        embeddings, norm = (getattr(self, name) for name in self.parts)
        return norm(self.encoder(embeddings(pixel_values)))


class OlderSiglipTransformer(SiglipVisionTransformer):
    """Of `siglip`: embedding, encoder, layernorm."""

    parts, encoder_class = ("embedding", "layernorm"), OlderSiglipEncoder


class SiglipVisionModel(nn.Module):
    """The tower as `vision_model`, of `modeling_siglip`."""

    transformer_class: type[SiglipVisionTransformer] = SiglipVisionTransformer

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config, self.vision_model = config, self.transformer_class(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, image_size, image_size] -> [B, patches, hidden], a bare tensor."""
        return self.vision_model(pixel_values)


class SiglipModel(SiglipVisionModel):
    """The same, of `siglip`."""

    transformer_class = OlderSiglipTransformer
