"""CLIP's vision tower, which LLaVA 1.5 reads: SigLIP's layers under a class token, with a norm before them."""

import torch
from torch import nn

from mllama.config import MllamaVisionConfig
from mllama.nn.norm import LayerNorm
from mllama.towers.siglip import PatchEmbedding, SiglipVisionTower


class ClipEmbeddings(nn.Module):
    """A class token and the patches, plus a learned position each."""

    def __init__(self, config: MllamaVisionConfig):
        super().__init__()
        patches = (config.image_size // config.patch_size) ** 2
        self.class_embedding = nn.Parameter(torch.randn(config.hidden_size))
        self.patch_embedding = PatchEmbedding(config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=False)
        self.position_embedding = nn.Embedding(patches + 1, config.hidden_size)

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, S, S] -> [B, 1 + patches, hidden]."""
        patches = self.patch_embedding(pixel_values).flatten(2).mT
        first = self.class_embedding.to(patches.dtype).expand(patches.shape[0], 1, -1)
        tokens = torch.cat([first, patches], dim=1)
        return tokens + self.position_embedding(torch.arange(tokens.shape[1], device=tokens.device))


class ClipVisionTower(SiglipVisionTower):
    """Encoder of square pictures; the class token's feature comes first."""

    embeddings_class = ClipEmbeddings

    def __init__(self, config: MllamaVisionConfig):
        super().__init__(config)
        self.pre_layrnorm = LayerNorm(config.hidden_size, config.layer_norm_eps)  # spelt as the files spell it

    def embed(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """[B, C, S, S] -> [B, 1 + patches, hidden]."""
        return self.pre_layrnorm(self.embeddings(pixel_values))
