"""Convert the linear layers of a module to LoRA layers, in place."""

import warnings
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from torch import nn

from mllama.lora.adapter import DEFAULT, Options, check_adapter, matrix_of
from mllama.lora.layer import Linear_LORA, active_name, lora_layers
from mllama.nn.packed import PackedLinear

_Model = TypeVar("_Model", bound=nn.Module)


def convert_linears_to_lora(
    module: nn.Module,
    rank: int = 4,
    alpha: float = 16,
    dropout: float = 0.0,
    target_module_classes: type[nn.Linear] | tuple[type[nn.Linear], ...] = (nn.Linear,),
    target_module_names: str | Iterable[str] | None = None,
) -> dict[str, Linear_LORA]:
    """Wrap linear layers of a module in `Linear_LORA`, and freeze everything else in it.

    Each layer becomes the `linear` of the new one, with its weight, bias, dtype, device and
    training mode. The output does not change until the adapter is trained. Parameters outside
    `module` are not changed: `convert_linears_to_lora(model.language_model)` skips the vision
    encoder, whose layers have the same names. Existing LoRA layers stay as they are. A layer used
    in several places stays one layer. A layer that shares its weight with another module, such as
    an output head tied to the embedding, is skipped. Packed layers count as nn.Linear.

    Args:
        module: the module to search, at any depth.
        rank, alpha, dropout: of every new adapter, see `Linear_LORA`.
        target_module_classes: nn.Linear or subclasses of it. Subclasses of these match too.
        target_module_names: ends of names: "q_proj", "self_attn.q_proj" or the full dotted name.
            Default: every layer.

    Returns:
        The new layers by dotted name. A layer used in several places appears under each name.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: rank, alpha or dropout is out of range; no layer matches; module is itself a
            linear layer, which cannot be replaced in place; a layer requested by name shares its
            weight.

    Warns:
        UserWarning: some names, but not all, match no layer.
    """
    check_adapter(rank, alpha, dropout)
    classes, names = _classes(target_module_classes), _names(target_module_names)
    adapted = lora_layers(module)
    if isinstance(module, classes):
        raise ValueError(
            f"module is itself a {type(module).__name__}, which cannot be replaced in place: pass "
            "the module that contains it"
        )
    found = linear_layers(module, classes)
    _check_found(module, names, [*found, *adapted])
    chosen = {name: layer for name, layer in found.items() if names is None or _fits(name, names)}
    tied = tied_layers(module, chosen)
    if tied and (names is not None or len(tied) == len(found) and not adapted):
        raise ValueError(
            f"{', '.join(tied)} shares its weight with another module, so an adapter could not be "
            "merged: leave it out, or give it a weight of its own first"
        )
    options = Options(rank, alpha, dropout)
    return put_adapters(
        module, {layer: options for name, layer in chosen.items() if name not in tied}
    )


def replace_linear_with_lora(
    module: nn.Module,
    rank: int = 8,
    alpha: float = 32,
    dropout: float = 0.0,
    target_module_names: str | Iterable[str] | None = None,
) -> dict[str, Linear_LORA]:
    """`convert_linears_to_lora` with other defaults, for older scripts.

    Arguments, Returns and Raises as `convert_linears_to_lora`.
    """
    return convert_linears_to_lora(
        module, rank, alpha, dropout, target_module_names=target_module_names
    )


def convert_to_lora(
    model: _Model, target_modules: str | Iterable[str] | None, rank: int, alpha: float
) -> _Model:
    """`convert_linears_to_lora` for older scripts: names come first, and the model is returned.

    Arguments and Raises as `convert_linears_to_lora`.
    """
    convert_linears_to_lora(model, rank, alpha, target_module_names=target_modules)
    return model


def linear_layers(
    module: nn.Module, classes: tuple[type[nn.Linear], ...] = (nn.Linear,)
) -> dict[str, nn.Linear | PackedLinear]:
    """Linear layers under each of their dotted names, except those inside LoRA layers."""
    return {
        name: layer
        for name, layer in adaptable_layers(module, classes).items()
        if not isinstance(layer, Linear_LORA)
    }


def adaptable_layers(
    module: nn.Module, classes: tuple[type[nn.Linear], ...] = (nn.Linear,)
) -> dict[str, Any]:
    """Linear layers and LoRA layers under each of their dotted names, in the module's order; not
    what is inside of LoRA layers.
    """
    kinds: tuple[Any, ...] = (*classes, PackedLinear) if nn.Linear in classes else classes
    everything = list(module.named_modules(remove_duplicate=False))
    inside = tuple(
        f"{name}." if name else "" for name, layer in everything if isinstance(layer, Linear_LORA)
    )
    return {
        name: layer
        for name, layer in everything
        if isinstance(layer, Linear_LORA)
        or (isinstance(layer, kinds) and not name.startswith(inside))
    }


def tied_layers(module: nn.Module, layers: Mapping[str, nn.Module]) -> list[str]:
    """Names of linear layers whose weight another module of `module` has too."""
    owners = Counter(
        id(tensor)
        for part in module.modules()
        for tensor in (*part.parameters(recurse=False), *part.buffers(recurse=False))
    )
    return [
        name
        for name, layer in layers.items()
        if isinstance(layer, nn.Linear | PackedLinear) and owners[id(matrix_of(layer))] > 1
    ]


def put_adapters(
    module: nn.Module,
    chosen: Mapping[nn.Module, Options],
    name: str | None = None,
    freeze: bool = True,
) -> dict[str, Linear_LORA]:
    """Freeze everything but LoRA adapters, then give each chosen linear layer, wherever it is used,
    a new adapter, which is in use afterwards.

    Args:
        module: what contains the layers.
        chosen: linear layers, which are wrapped, and LoRA layers, which get one more.
        name: the adapter's. Default: the one in use.
        freeze: False leaves parameters that are no adapter's as they are.

    Returns:
        The layers by each of their dotted names.

    Raises:
        ValueError: a number is out of range, or another adapter is merged; nothing has changed.
    """
    name = name or active_name(module) or DEFAULT
    for options in chosen.values():
        check_adapter(options.rank, options.alpha, options.dropout)
    layers = lora_layers(module).values()
    switches = any(layer.name != name or not layer.active for layer in layers)
    if switches:
        check_unmerged(module)
    adapters = {parameter for layer in layers for parameter in layer.adapter()}
    for parameter in module.parameters():
        if freeze and parameter not in adapters:
            parameter.requires_grad_(False)
    found = {
        each: layer
        for each, layer in module.named_modules(remove_duplicate=False)
        if layer in chosen
    }
    wrapped: dict[nn.Module, Linear_LORA] = {}
    for layer, options in chosen.items():
        if isinstance(layer, Linear_LORA):
            layer.add(name, *options)
            wrapped[layer] = layer
        else:
            wrapped[layer] = Linear_LORA.around(layer, *options, name)  # type: ignore[arg-type]
    for each, layer in found.items():
        if layer is not wrapped[layer]:
            module.set_submodule(each, wrapped[layer])
    if switches:
        use_adapter(module, name)
    return {each: wrapped[layer] for each, layer in found.items()}


def use_adapter(module: nn.Module, name: str) -> None:
    """Make the adapter of this name the active one, in all layers that have it.

    Raises:
        ValueError: an adapter is merged.
    """
    check_unmerged(module)
    for layer in lora_layers(module).values():
        if name in layer.adapters():
            layer.activate(name)
        else:
            layer.deactivate()


def check_unmerged(module: nn.Module) -> None:
    """Raise ValueError if an adapter is merged: another one cannot be used then."""
    if any(layer.merged_weight is not None for layer in lora_layers(module).values()):
        raise ValueError("an adapter is merged: call mllama.unmerge_lora(model) first")


def _fits(name: str, targets: Iterable[str]) -> bool:
    return any(f".{name}".endswith(f".{target}") for target in targets)


def _check_found(module: nn.Module, names: tuple[str, ...] | None, there: list[str]) -> None:
    """Check that there are linear layers, and one for every name. LoRA layers count."""
    if not there:
        raise ValueError(f"this {type(module).__name__} has no linear layers to convert")
    wanted = names or ()
    unknown = [target for target in wanted if not any(_fits(name, [target]) for name in there)]
    ends = ", ".join(sorted({name.rpartition(".")[2] for name in there}))
    if not unknown:
        return
    message = (
        f"target_module_names: no linear layer is called {', '.join(unknown)}; there are {ends}"
    )
    if len(unknown) == len(wanted):
        raise ValueError(message)
    warnings.warn(message, stacklevel=3)


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
        raise ValueError("target_module_names is empty: pass names, or None for every linear layer")
    return names
