"""Models of packed random weights, for sizes whose dense weights memory does not hold."""

from typing import Any

import torch
from torch import nn

from mllama import MllamaForConditionalGeneration
from mllama.quant.packer import Packer

ROWS = 256  # that are random; a weight repeats them


def random_packed(config: Any, weights: str) -> MllamaForConditionalGeneration:
    """A model in bfloat16, packed while it is made: memory has the packed weights and one dense
    tensor.

    Args:
        config: a config object of transformers.
        weights: as `mllama.optimize` takes it.
    """
    with torch.device("meta"):
        model = MllamaForConditionalGeneration(config)
    model.to(torch.bfloat16)
    packer = Packer(model, weights)
    for name, parameter in list(model.named_parameters()):
        value = _random(parameter.shape)
        if not packer.take(name, lambda value=value: value, None, torch.bfloat16):
            owner, _, last = name.rpartition(".")
            setattr(model.get_submodule(owner), last, nn.Parameter(value, requires_grad=False))
    packer.finish()
    return model.eval()


def _random(shape: torch.Size) -> torch.Tensor:
    rows = torch.randn(min(ROWS, shape[0]), *shape[1:]).mul_(0.02).bfloat16()
    times = -(-shape[0] // len(rows))
    return rows.repeat(times, *[1] * (len(shape) - 1))[: shape[0]].contiguous()
