"""The adapters of a whole model: parameters, disabling, merging."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, overload

import torch
from torch import nn

from mllama.lora.layer import Linear_LORA, needed_lora_layers
from mllama.lora.turns import turn

_Model = TypeVar("_Model", bound=nn.Module)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Parameters A and B of every LoRA layer, and DoRA's magnitudes, each once, for an optimizer.
    Of several adapters, the active one's.

    Args:
        model: a module with LoRA layers.

    Returns:
        A list of A and B, layer by layer.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no LoRA layers.
    """
    return list(
        dict.fromkeys(
            parameter
            for layer in needed_lora_layers(model).values()
            if layer.active
            for parameter in layer.adapter()
        )
    )


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Context manager: the model computes without its adapters, merged or not, in every thread.

    Contexts may be nested; an exception restores the previous state. With activation
    checkpointing, run the backward pass inside the context too, because it recomputes activations.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no LoRA layers.
        RuntimeError: another thread is within such a context, or `lora_active`.
    """
    layers = needed_lora_layers(model).values()
    with turn(model, lambda: any(layer.enabled for layer in layers)):
        before = [(layer, layer.enabled) for layer in layers]
        try:
            for layer in layers:
                layer.enabled = False
            yield
        finally:
            for layer, enabled in before:
                layer.enabled = enabled


def merge_lora(model: nn.Module) -> None:
    """Merge the adapter in use into a copy of each layer's weight: inference as fast as without.

    The frozen weights are kept, so adapted weights need memory twice. State dicts do not change.
    Merging again uses the adapters' current values. Merged layers cannot be trained.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no LoRA layers, or one whose `linear` is not a plain linear layer, or is
            in float16, which cannot hold the sum; then none is merged.
    """
    for layer in _mergeable(model):
        if layer.active:
            layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`. The frozen weights are bit for bit the same as before.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no LoRA layers.
    """
    for layer in needed_lora_layers(model).values():
        layer.unmerge()


@overload
def merge_and_unload(model: Linear_LORA) -> nn.Linear: ...
@overload
def merge_and_unload(model: _Model) -> _Model: ...
def merge_and_unload(model: nn.Module) -> nn.Module:
    """Add the adapter in use to its layers' weights permanently, and restore plain linear layers;
    other adapters are dropped.

    `save_pretrained` then writes the model in its family's format. Adapters that are added later
    belong to the new weights: save the model, and load the adapters onto it.

    Returns:
        The model, changed in place, or the linear layer of a lone LoRA layer. Parameters stay
        frozen.

    Raises:
        TypeError: model is not a module.
        ValueError: it has no LoRA layers, or one whose `linear` is not a plain linear layer, or is
            in float16, which cannot hold the sum; then nothing is changed.
    """
    places: dict[Linear_LORA, list[str]] = {layer: [] for layer in _mergeable(model)}
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, Linear_LORA):
            places[module].append(name)
    merged = model
    for layer, names in places.items():
        # Replaced at once: after an interrupt, every layer still has its update once.
        plain = layer.unload()
        if layer is model:
            merged = plain
            continue
        for name in names:
            model.set_submodule(name, plain)
    return merged


@torch.no_grad()
def _mergeable(model: nn.Module) -> list[Linear_LORA]:
    layers = needed_lora_layers(model)
    for name, layer in layers.items():
        layer.check_mergeable(name)
        if layer.active and layer.linear.weight.dtype == torch.float16:
            layer.summed(name)  # raises where it is out of range
    return list(layers.values())
