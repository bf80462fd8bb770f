"""The optimizer of a run, and its state as named tensors and numbers."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from mllama.nn.wrappers import put
from mllama.train.settings import TrainSettings

_Named = Mapping[str, nn.Parameter]


def make_optimizer(parameters: _Named, settings: TrainSettings) -> torch.optim.Optimizer:
    """AdamW. Matrices decay, vectors (norms, biases, magnitudes) do not.

    Raises:
        ValueError: 8-bit states on a CPU.
        ImportError: bitsandbytes is missing.
    """
    groups = [
        {
            "params": [one for one in parameters.values() if (one.ndim > 1) == decays],
            "weight_decay": settings.weight_decay * decays,
        }
        for decays in (True, False)
    ]
    groups = [group for group in groups if group["params"]]
    if settings.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=settings.learning_rate)
    device = next(iter(parameters.values())).device
    if device.type != "cuda":
        raise ValueError(f"optimizer adamw8bit needs a CUDA device, this is {device}: use adamw")
    try:
        import bitsandbytes
    except ImportError:
        raise ImportError(
            "optimizer adamw8bit needs bitsandbytes, which is not installed"
        ) from None
    return bitsandbytes.optim.AdamW8bit(groups, lr=settings.learning_rate)


def optimizer_state(
    optimizer: torch.optim.Optimizer, parameters: _Named
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """The state of each parameter: tensors by "PARAMETER.NAME", and other values likewise."""
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, Any] = {}
    for name, parameter in parameters.items():
        for key, value in optimizer.state.get(parameter, {}).items():
            place = tensors if isinstance(value, torch.Tensor) else plain
            place[f"{name}.{key}"] = value
    return tensors, plain


def load_optimizer_state(
    optimizer: torch.optim.Optimizer,
    parameters: _Named,
    tensors: Mapping[str, torch.Tensor],
    plain: Mapping[str, Any],
) -> None:
    """Put a state of `optimizer_state` back."""
    by_parameter: dict[str, dict[str, Any]] = {}
    for place, value in {**tensors, **plain}.items():
        name, _, key = place.rpartition(".")
        if isinstance(value, torch.Tensor) and value.shape == parameters[name].shape:
            whole, value = value, torch.zeros_like(parameters[name], dtype=value.dtype)
            put(value, whole)
        by_parameter.setdefault(name, {})[key] = value
    names = {parameter: name for name, parameter in parameters.items()}
    order = [one for group in optimizer.param_groups for one in group["params"]]
    found = optimizer.state_dict()
    found["state"] = {
        index: by_parameter[names[one]]
        for index, one in enumerate(order)
        if names[one] in by_parameter
    }
    optimizer.load_state_dict(found)
