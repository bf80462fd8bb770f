"""Adapters of a whole model: its parameters, the switch, merging and back."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TypeVar, overload

from torch import nn

from mllama.lora.layer import Linear_LORA, needed_lora_layers

_Model = TypeVar("_Model", bound=nn.Module)


def lora_parameters(model: nn.Module) -> list[nn.Parameter]:
    """The adapters' parameters, A and B of every LoRA layer, each once: what an optimizer is to be
    given.

    Raises:
        TypeError: model is no module.
        ValueError: it has no LoRA layers.
    """
    return list(
        dict.fromkeys(
            parameter
            for layer in needed_lora_layers(model).values()
            for parameter in layer.adapter()
        )
    )


@contextmanager
def lora_disabled(model: nn.Module) -> Iterator[None]:
    """Inside this context the model computes without its adapters, merged or not, as before it was
    converted; for every thread.

    Contexts may be nested, and an error restores what was. A backward pass through what was
    computed here belongs inside, too, where
    activations are checkpointed: they are computed again by it.

    Raises:
        TypeError: model is no module.
        ValueError: it has no LoRA layers.
    """
    before = [(layer, layer.enabled) for layer in needed_lora_layers(model).values()]
    try:
        for layer, _ in before:
            layer.enabled = False
        yield
    finally:
        for layer, enabled in before:
            layer.enabled = enabled


def merge_lora(model: nn.Module) -> None:
    """Have every LoRA layer multiply by one weight, the adapter added: as fast as without adapters,
    for inference.

    The frozen weights stay where they are, so memory holds the adapted ones twice; state dicts are
    as before. Merging again takes the adapters as they are then. A merged layer refuses to be
    trained.

    Raises:
        TypeError: model is no module.
        ValueError: it has no LoRA layers, or one whose `linear` is no plain linear layer; then none
            is merged.
    """
    for layer in _mergeable(model):
        layer.merge()


def unmerge_lora(model: nn.Module) -> None:
    """Undo `merge_lora`: the frozen weights, which it did not touch, and the adapters compute
    again.

    Raises:
        TypeError: model is no module.
        ValueError: it has no LoRA layers.
    """
    for layer in needed_lora_layers(model).values():
        layer.unmerge()


@overload
def merge_and_unload(model: Linear_LORA) -> nn.Linear: ...
@overload
def merge_and_unload(model: _Model) -> _Model: ...
def merge_and_unload(model: nn.Module) -> nn.Module:
    """Add every adapter to its layer's weight, for good, and put plain linear layers back in place:
    a model as it was before converting, with other weights, which `save_pretrained` writes in its
    family's format. Adapters that it is given afterwards are for these weights: save them, too, and
    load the adapters onto them.

    Returns:
        The model, changed in place; of a lone LoRA layer its linear layer. Parameters stay frozen.

    Raises:
        TypeError: model is no module.
        ValueError: it has no LoRA layers, or one whose `linear` is no plain linear layer; then
            nothing is changed.
    """
    plain: dict[nn.Module, nn.Module] = {layer: layer.unload() for layer in _mergeable(model)}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if name and layer in plain:
            model.set_submodule(name, plain[layer])
    return plain.get(model, model)


def _mergeable(model: nn.Module) -> list[Linear_LORA]:
    layers = needed_lora_layers(model)
    for name, layer in layers.items():
        layer.check_mergeable(name)
    return list(layers.values())
