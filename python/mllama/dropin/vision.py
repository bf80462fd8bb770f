"""SigLIP on the package's operators, which returns bare tensors.

Parameters of `siglip` have the older names (`layernorm1`, `embedding`), those of `modeling_siglip`
Hugging Face's (`layer_norm1`, `embeddings`).
"""

from typing import Any

import torch
from torch import nn

from mllama.encoders.siglip import SiglipEmbeddings, SiglipImageEncoder, check_pixels
from mllama.hf.configs import MllamaVisionConfig
from mllama.nn.attention import BidirectionalAttention
from mllama.nn.mlp import MLP
from mllama.nn.norm import LayerNorm


class SiglipVisionConfig(MllamaVisionConfig):
    """SigLIP's sizes by name, SigLIP-base's by default; other names are stored as attributes."""

    def __init__(self, *, num_image_tokens: int | None = None, **kwargs: Any):
        super().__init__(num_image_tokens=num_image_tokens, **kwargs)


class SiglipVisionEmbeddings(SiglipEmbeddings):
    """Patches plus learned positions."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__(config)
        self.config, self.num_patches = config, self.positions

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, image_size, image_size], in any floating dtype, -> [B, patches, hidden].

        Raises:
            TypeError: pixel_values are not floating. ValueError: another shape.
        """
        check_pixels(pixel_values, self.config)
        return super().forward(pixel_values)


class SiglipAttention(BidirectionalAttention):
    """Every patch attends to all patches."""

    def __init__(self, config: SiglipVisionConfig):
        heads = config.num_attention_heads
        super().__init__(config.hidden_size, heads, config.attention_dropout)
        self.num_heads, self.scale = heads, self.head_dim**-0.5

    def forward(
        self, hidden_states: torch.Tensor, output_attentions: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[B, P, hidden] -> (the same shape, probabilities [B, heads, P, P] or None)."""
        return super().forward(hidden_states, output_attentions)


class SiglipMLP(MLP):
    """fc2(gelu(fc1(x))), GELU in the tanh form that the checkpoints were trained with."""

    def __init__(self, config: SiglipVisionConfig):
        activation = getattr(config, "hidden_act", "gelu_pytorch_tanh")
        super().__init__(config.hidden_size, config.intermediate_size, activation)


class SiglipEncoderLayer(nn.Module):
    """Pre-norm transformer block: layernorm1, self_attn, layernorm2, mlp."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.layernorm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = SiglipAttention(config)
        self.layernorm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = SiglipMLP(config)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """[B, P, hidden] -> the same shape."""
        attended, _ = self.self_attn(self.layernorm1(hidden_states), output_attentions=False)
        hidden_states = hidden_states + attended
        return hidden_states + self.mlp(self.layernorm2(hidden_states))


class SiglipEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        layers = range(config.num_hidden_layers)
        self.layers = nn.ModuleList(SiglipEncoderLayer(config) for _ in layers)

    def forward(self, inputs_embeds: torch.Tensor) -> torch.Tensor:
        """[B, P, hidden] -> the same shape."""
        for layer in self.layers:
            inputs_embeds = layer(inputs_embeds)
        return inputs_embeds


class SiglipVisionTransformer(nn.Module):
    """embedding, encoder and layernorm."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.embedding = SiglipVisionEmbeddings(config)
        self.encoder = SiglipEncoder(config)
        self.layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, image_size, image_size] -> [B, patches, hidden]."""
        return self.layernorm(self.encoder(self.embedding(pixel_values)))


class SiglipModel(nn.Module):
    """`siglip`'s encoder as `vision_model`."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config, self.vision_model = config, SiglipVisionTransformer(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, image_size, image_size] -> [B, patches, hidden], a bare tensor."""
        return self.vision_model(pixel_values)


class SiglipVisionModel(nn.Module):
    """`modeling_siglip`'s, the package's encoder as `vision_model`."""

    def __init__(self, config: SiglipVisionConfig):
        super().__init__()
        self.config, self.vision_model = config, SiglipImageEncoder(config)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, channels, image_size, image_size] -> [B, patches, hidden], a bare tensor."""
        return self.vision_model(pixel_values).last_hidden_state
