"""Linear layers of a module -> LoRA layers, in place."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import TypeVar

from torch import nn

from mllama.lora.layer import Linear_LORA, check_adapter, lora_layers

_Model = TypeVar("_Model", bound=nn.Module)


def convert_linears_to_lora(
    module: nn.Module,
    rank: int = 4,
    alpha: float = 16,
    dropout: float = 0.0,
    target_module_classes: type[nn.Linear] | tuple[type[nn.Linear], ...] = (nn.Linear,),
    target_module_names: str | Iterable[str] | None = None,
) -> dict[str, Linear_LORA]:
    """Put a `Linear_LORA` around linear layers inside a module, and freeze all else in it.

    Each layer itself becomes the `linear` of the new one, with its weight, bias, dtype, device and
    training mode, and computes what it did until its adapter has learnt. Afterwards the module's
    only trainable parameters are adapters; what is outside of it is not touched:
    `convert_linears_to_lora(model.language_model)` leaves the vision tower alone, whose layers have
    the same names. LoRA layers that are there already stay as they are, and are never adapted
    again. A layer that stands in several places stays one layer.

    A layer that shares its weight with another module, as an output head tied to the embedding
    does, is passed over.

    Args:
        module: where to look, at any depth.
        rank, alpha, dropout: of every new adapter, as `Linear_LORA` takes them.
        target_module_classes: nn.Linear or subclasses of it; what is a subclass of one of them
            counts too.
        target_module_names: names as they end: "q_proj", "self_attn.q_proj" or the whole dotted
            name. None is every layer.

    Returns:
        The new layers by their dotted names; a layer that stands in several places is there under
        each name.

    Raises:
        TypeError: an argument of another type.
        ValueError: a rank, alpha or dropout out of range; no layer there that fits, or the module
            itself is one, which cannot be replaced from within; a layer asked for by name that
            shares its weight.

    Warns:
        UserWarning: some of the names, not all, fit nothing.
    """
    check_adapter(rank, alpha, dropout)
    classes, names = _classes(target_module_classes), _names(target_module_names)
    adapted = lora_layers(module)
    if isinstance(module, classes):
        raise ValueError(
            f"module is itself a {type(module).__name__}, which cannot be replaced in place: give the module around it"
        )
    found = linear_layers(module, classes)
    _check_found(module, names, [*found, *adapted])
    chosen = {name: layer for name, layer in found.items() if names is None or _fits(name, names)}
    owners = Counter(
        id(parameter) for part in module.modules() for parameter in part.parameters(recurse=False)
    )
    tied = [name for name, layer in chosen.items() if owners[id(layer.weight)] > 1]
    if tied and (names is not None or len(tied) == len(found) and not adapted):
        raise ValueError(
            f"{', '.join(tied)} shares its weight with another module, with which an adapter could not be merged: leave it out, or give it"
            " a weight of its own first"
        )
    return put_adapters(
        module,
        {layer: (rank, alpha) for name, layer in chosen.items() if name not in tied},
        dropout,
    )


def replace_linear_with_lora(
    module: nn.Module,
    rank: int = 8,
    alpha: float = 32,
    dropout: float = 0.0,
    target_module_names: str | Iterable[str] | None = None,
) -> dict[str, Linear_LORA]:
    """`convert_linears_to_lora` with other defaults, as some scripts know it."""
    return convert_linears_to_lora(
        module, rank, alpha, dropout, target_module_names=target_module_names
    )


def convert_to_lora(
    model: _Model, target_modules: str | Iterable[str] | None, rank: int, alpha: float
) -> _Model:
    """`convert_linears_to_lora` with names first, as some scripts know it; returns the model, which
    they assign.
    """
    convert_linears_to_lora(model, rank, alpha, target_module_names=target_modules)
    return model


def linear_layers(
    module: nn.Module, classes: tuple[type[nn.Linear], ...] = (nn.Linear,)
) -> dict[str, nn.Linear]:
    """Linear layers by every dotted name they have; those inside LoRA layers are none."""
    everything = list(module.named_modules(remove_duplicate=False))
    inside = tuple(
        f"{name}." if name else "" for name, layer in everything if isinstance(layer, Linear_LORA)
    )
    return {
        name: layer
        for name, layer in everything
        if isinstance(layer, classes) and not name.startswith(inside)
    }


def put_adapters(
    module: nn.Module, chosen: Mapping[nn.Linear, tuple[int, float]], dropout: float = 0.0
) -> dict[str, Linear_LORA]:
    """Freeze all but LoRA adapters, then put a LoRA layer of (rank, alpha) around each linear
    layer, wherever it stands.
    """
    kept = {parameter for layer in lora_layers(module).values() for parameter in layer.adapter()}
    for parameter in module.parameters():
        if parameter not in kept:
            parameter.requires_grad_(False)
    places = {name: linear for name, linear in linear_layers(module).items() if linear in chosen}
    made = {
        linear: Linear_LORA.around(linear, *numbers, dropout) for linear, numbers in chosen.items()
    }
    for name, linear in places.items():
        module.set_submodule(name, made[linear])
    return {name: made[linear] for name, linear in places.items()}


def _fits(name: str, targets: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _check_found(module: nn.Module, names: tuple[str, ...] | None, there: list[str]) -> None:
    """There must be linear layers, and of every name some; adapted ones count."""
    if not there:
        raise ValueError(f"this {type(module).__name__} has no linear layers to convert")
    wanted = names or ()
    unknown = [target for target in wanted if not any(_fits(name, [target]) for name in there)]
    ends = ", ".join(sorted({name.rpartition(".")[2] for name in there}))
    if unknown and len(unknown) == len(wanted):
        raise ValueError(
            f"target_module_names: no linear layer is called {', '.join(unknown)}; there are {ends}"
        )
    if unknown:
        warnings.warn(
            f"target_module_names: no linear layer is called {', '.join(unknown)}; there are {ends}",
            stacklevel=3,
        )


def _classes(given: type[nn.Linear] | tuple[type[nn.Linear], ...]) -> tuple[type[nn.Linear], ...]:
    classes = given if isinstance(given, (tuple, list)) else (given,)
    if not classes or not all(
        isinstance(kind, type) and issubclass(kind, nn.Linear) for kind in classes
    ):
        raise TypeError(
            f"target_module_classes must be nn.Linear or subclasses of it, got {given!r}"
        )
    return tuple(classes)


def _names(given: str | Iterable[str] | None) -> tuple[str, ...] | None:
    if given is None:
        return None
    names = (
        (given,) if isinstance(given, str) else tuple(given) if isinstance(given, Iterable) else ()
    )
    if not all(isinstance(name, str) for name in names) or not isinstance(given, Iterable):
        raise TypeError(f"target_module_names must be names or None, got {given!r}")
    if not names:
        raise ValueError("target_module_names is empty: give names, or None for every linear layer")
    return names
