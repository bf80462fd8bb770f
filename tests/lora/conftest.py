"""A small converted model whose adapters say something."""

import pytest
import torch
from torch import nn

import mllama


@pytest.fixture
def converted():
    """converted(seed, **options): two layers with LoRA and one between without."""

    def make(seed: int = 0, **options) -> nn.Sequential:
        torch.manual_seed(seed)
        model = nn.Sequential(
            nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 9), nn.Tanh(), nn.Linear(9, 4, bias=False)
        ).eval()
        for layer in mllama.convert_linears_to_lora(
            model, **{"target_module_names": ["0", "4"]} | options
        ).values():
            nn.init.normal_(layer.lora_b.weight)
        return model

    return make
