"""Loads and adapts the model of a run."""

from contextlib import nullcontext, redirect_stderr
from io import StringIO
from typing import Any

import torch
from torch import nn

from mllama import api
from mllama.device import choose_device, choose_dtype, dtype_named
from mllama.lora.adapt import Adapted, adapt
from mllama.lora.layer import lora_layers
from mllama.lora.loading import load_lora
from mllama.lora.state import lora_parameters
from mllama.nn.wrappers import plain_name
from mllama.train.settings import TrainSettings


def prepare_model(
    settings: TrainSettings, device: torch.device | None = None, quiet: bool = False
) -> tuple[Any, Any, Adapted | None]:
    """Load a run's model and make it trainable, packed and adapted as its settings say.

    Frozen weights have the dtype of the computation. What is trained is float32, and computes in
    that dtype under autocast (`compute_dtype`): small changes would be lost in 16 bits.

    Args:
        settings: the run's settings.
        device: in place of the settings' device.
        quiet: do not print what was loaded and adapted.

    Returns:
        (model, processor, what was adapted; None with method "full"). The model is in eval mode.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `mllama.load` and `mllama.lora.adapt.adapt`.
    """
    place = choose_device(settings.device) if device is None else device
    load = api.load_quietly if quiet else api.load
    model, processor = load(settings.model, settings.dtype, place, weights=settings.weights)
    return model, processor, make_trainable(model, settings, quiet)


def make_trainable(model: Any, settings: TrainSettings, quiet: bool = False) -> Adapted | None:
    """Adapt a model that is loaded, or laid out on the meta device, and choose what is trained.

    Returns:
        What was adapted; None with method "full", or with an adapter of the settings.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `mllama.lora.adapt.adapt` and
            `mllama.load_lora`; the model has no decoder, or cannot be trained so.
    """
    if not hasattr(model, "language_model"):
        raise ValueError("model must have a decoder: this one has no answers to train")
    torch.manual_seed(settings.seed)
    model.requires_grad_(False)
    adapted = None
    if settings.method == "full":
        model.requires_grad_(True)  # which a packed model refuses
    elif settings.adapter is not None:
        load_lora(model, settings.adapter)
    else:
        adapted = _adapt(model, settings, quiet)
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
    if settings.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    return adapted


def _adapt(model: nn.Module, settings: TrainSettings, quiet: bool) -> Adapted:
    with redirect_stderr(StringIO()) if quiet else nullcontext():
        return adapt(
            model,
            targets=settings.targets,
            rank=settings.rank,
            alpha=settings.alpha,
            dropout=settings.dropout,
            ranks=settings.ranks,
            rslora=settings.rslora,
            dora=settings.dora,
            trained_modules=settings.trained_modules,
        )


def compute_dtype(settings: TrainSettings, model: nn.Module) -> torch.dtype:
    """The dtype that a prepared model computes in."""
    if (named := dtype_named(settings.dtype)) is not None:
        return named
    frozen = [one for one in model.parameters() if not one.requires_grad]
    if frozen:
        return frozen[0].dtype
    size = sum(one.nbytes for one in model.parameters()) // 2  # as 16-bit weights
    return choose_dtype(next(model.parameters()).device, size)


def autocast(device: str, dtype: torch.dtype) -> torch.autocast:
    """Context in which a prepared model computes in a dtype, on a type of device."""
    return torch.autocast(device, dtype, enabled=dtype != torch.float32)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """What is trained, by name.

    Raises:
        ValueError: nothing is.
    """
    found = {
        plain_name(model, name): parameter
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    if not found:
        raise ValueError("nothing is trained: targets and trained_modules name no parameter")
    return found


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters of LoRA layers; none of a model without adapters."""
    return lora_parameters(model) if lora_layers(model) else []
