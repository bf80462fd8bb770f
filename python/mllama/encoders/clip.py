"""CLIP's vision encoder, as LLaVA 1.5 uses it: SigLIP's layers with a class token, and a norm
before them.
"""

import torch
from torch import nn

from mllama.config.spec import VisionSpec, count_patches
from mllama.encoders.siglip import PatchEmbedding, SiglipImageEncoder, interpolate_positions
from mllama.nn.norm import LayerNorm


class ClipEmbeddings(nn.Module):
    """A class token and the patches, plus learned positions."""

    def __init__(self, config: VisionSpec):
        super().__init__()
        self.positions = count_patches(config) + 1
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size))
        self.patch_embedding = PatchEmbedding.of(config, bias=False)
        self.position_embedding = nn.Embedding(self.positions, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, H, W] -> [B, 1 + patches, hidden]."""
        patches = self.patch_embedding(pixel_values)
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        tokens = torch.cat([first, patches.flatten(2).mT], dim=1)
        table = self.position_embedding(torch.arange(self.positions, device=patches.device))
        return tokens + torch.cat(
            [table[:1], interpolate_positions(table[1:], *patches.shape[-2:])]
        )


class ClipImageEncoder(SiglipImageEncoder):
    """Encoder of square images; the class token's feature comes first."""

    class_tokens = 1

    def __init__(self, config: VisionSpec):
        super().__init__(config)
        self.pre_layrnorm = LayerNorm(
            config.hidden_size, config.layer_norm_eps
        )  # the checkpoints' spelling

    def make_embeddings(self, config: VisionSpec) -> nn.Module:
        """Build the module that `embed` calls."""
        return ClipEmbeddings(config)

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, S, S] -> [B, 1 + patches, hidden]."""
        return self.pre_layrnorm(self.embeddings(pixel_values))
