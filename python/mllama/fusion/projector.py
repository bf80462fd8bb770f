"""Pooling and projection: from the encoder's features to the decoder's width."""

import torch
from torch import nn

from mllama.config.spec import ModelSpec, count_patches
from mllama.nn.activation import activated


class MultiModalProjector(nn.Module):
    """linear_2(act(linear_1(x)))."""

    def __init__(
        self,
        input_size: int,
        inner_size: int,
        output_size: int,
        activation: str = "gelu",
        bias: bool = True,
    ):
        super().__init__()
        self.linear_1 = nn.Linear(input_size, inner_size, bias=bias)
        self.activation = activation
        self.linear_2 = nn.Linear(inner_size, output_size, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[..., input_size] -> [..., output_size]."""
        return self.linear_2(activated(self.linear_1, features, self.activation))


class LinearProjector(nn.Module):
    """One linear layer, with or without a bias."""

    def __init__(self, input_size: int, output_size: int, bias: bool = True):
        super().__init__()
        self.linear = nn.Linear(input_size, output_size, bias=bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[..., input_size] -> [..., output_size]."""
        return self.linear(features)


class AveragePooling(nn.AdaptiveAvgPool1d):
    """Average over neighboring patches."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, patches, width] -> [images, output_size, width]."""
        return super().forward(features.mT).mT


class LearnedPooling(nn.Module):
    """Each visual token is a learned weighted sum of all patches."""

    def __init__(self, patches: int, tokens: int):
        super().__init__()
        self.linear = nn.Linear(patches, tokens)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """[images, patches, width] -> [images, tokens, width]."""
        return self.linear(features.mT).mT


def make_projector(spec: ModelSpec) -> nn.Module:
    """Build the projector of a model."""
    features, inner, text = spec.projector_sizes
    if spec.projector == "linear":
        return LinearProjector(features, text, spec.projector_bias)
    return MultiModalProjector(features, inner, text, spec.projector_act, spec.projector_bias)


def make_pooling(spec: ModelSpec) -> nn.Module:
    """Build the pooling of a model's features."""
    if spec.pooling == "average":
        return AveragePooling(spec.tokens_per_image)
    patches = count_patches(spec.vision)
    return LearnedPooling(patches, spec.tokens_per_image)
