"""Several adapters in one model, by name: list, activate, combine, delete."""

import math
import numbers
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from mllama.lora.adapter import Options, check_name, parts_of
from mllama.lora.convert import put_adapters, use_adapter
from mllama.lora.layer import Linear_LORA, active_name, lora_layers, needed_lora_layers
from mllama.lora.state import lora_disabled
from mllama.lora.turns import turn
from mllama.nn.adapted import adapter_state, name_state, note_change, return_to_state
from mllama.nn.wrappers import is_sharded


def lora_names(model: nn.Module) -> list[str]:
    """Names of a model's adapters, the active one first; [] without LoRA layers.

    Raises:
        TypeError: model is not a module.
    """
    active = active_name(model)
    names = {name for layer in lora_layers(model).values() for name in layer.adapters()}
    return sorted(names, key=lambda name: (name != active, name))


def activate_lora(model: nn.Module, name: str) -> None:
    """Use the adapter of this name: the model computes with it alone, and it is the one that is
    trained, merged and saved by default. The others are frozen. Layers that it does not adapt
    compute without an update.

    Raises:
        TypeError: model is not a module, or name not a str.
        ValueError: the model has no adapter of that name; an adapter is merged; the model is
            sharded over processes.
        RuntimeError: another thread relies on the adapter in use, within `lora_active` or a call.
    """
    _check(model, name)
    _check_whole(model)
    with turn(model, lambda: name != active_name(model)):
        use_adapter(model, name)


@contextmanager
def lora_active(model: nn.Module, name: str | None) -> Iterator[None]:
    """Context manager: the model uses the adapter of this name, or none for None.

    Contexts may be nested; the adapter in use before, and which parameters are trainable, are
    restored.

    Raises:
        TypeError, ValueError: as `activate_lora`.
        RuntimeError: another thread is within such a context of another adapter.
    """
    if name is None:
        with lora_disabled(model):
            yield
        return
    layers = _check(model, name)
    with turn(model, lambda: name != active_name(model)) as changes:
        if not changes:
            yield
            return
        _check_whole(model)
        trained = {
            parameter: parameter.requires_grad
            for layer in layers.values()
            for adapter in layer.adapters().values()
            for parameter in parts_of(adapter).values()
        }
        before, outside = str(active_name(model)), adapter_state()
        use_adapter(model, name)
        inside = name_state(outside, (id(model), name))
        try:
            yield
        finally:
            unchanged = adapter_state() == inside
            use_adapter(model, before)
            for parameter, requires_grad in trained.items():
                parameter.requires_grad_(requires_grad)
            if unchanged:
                return_to_state(outside)


def combine_lora(
    model: nn.Module,
    names: Sequence[str],
    weights: Sequence[float] | None = None,
    name: str = "combined",
) -> None:
    """Make a new adapter, the weighted sum of the updates of others, and use it.

    It is exact: its matrices are the others' put together, so that its rank in every layer is the
    sum of theirs.

    Args:
        model: a model that has the adapters.
        names: of the adapters; they stay.
        weights: factors of their updates. Default: 1 each.
        name: the new one's.

    Raises:
        TypeError: model is not a module, or an argument is of another type.
        ValueError: a name is unknown or given twice; there is an adapter called `name`; weights are
            not as many, or not finite; an adapter is DoRA's, whose updates do not add up; an
            adapter is merged.
    """
    if isinstance(names, str) or len(set(names)) < len(names) or not names:
        raise ValueError(f"names must be different names of adapters, got {names!r}")
    for each in names:
        layers = _check(model, each)
    factors = [1.0] * len(names) if weights is None else list(weights)
    _check_weights(factors, names)
    check_name(name)
    if name in lora_names(model):
        raise ValueError(f"name: the model has an adapter {name!r} already")
    sums: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}
    for where, layer in layers.items():
        own, downs, ups = layer.adapters(), [], []
        for each, factor in zip(names, factors, strict=True):
            if each not in own:
                continue
            if own[each].lora_magnitude is not None:
                raise ValueError(f"{each} has magnitudes (DoRA) at {where}: it has no plain sum")
            downs.append(own[each].lora_a.weight.detach())
            up = own[each].lora_b.weight.detach()
            ups.append(up * (factor * own[each].alpha / own[each].rank))
        if downs:
            sums[layer] = torch.cat(downs), torch.cat(ups, 1)  # (sum of ranks, in), (out, sum)
    options = {layer: Options(len(down), len(down)) for layer, (down, _) in sums.items()}
    put_adapters(model, options, name, freeze=False)
    with torch.no_grad():
        for layer in layers.values():
            if layer in sums:
                layer.lora_a.weight.copy_(sums[layer][0])
                layer.lora_b.weight.copy_(sums[layer][1])


def delete_lora(model: nn.Module, name: str) -> None:
    """Remove an adapter. Layers without another one become plain linear layers again, with the
    frozen weight.

    Raises:
        TypeError, ValueError: as `activate_lora`. ValueError: it is in use and there are others:
            activate one of them first.
    """
    layers = _check(model, name)
    others = [each for each in lora_names(model) if each != name]
    if others and name == active_name(model):
        raise ValueError(
            f"{name!r} is in use: first call mllama.activate_lora with one of {others}"
        )
    plain: dict[nn.Module, nn.Module] = {}
    for where, layer in layers.items():
        if name not in layer.adapters():
            continue
        if not layer.inactive:
            if not where:
                raise ValueError("this layer's only adapter cannot be removed in place")
            plain[layer] = layer.linear
        else:
            if name == layer.name:  # the layer is not in use, as the active adapter has none here
                layer.activate(next(iter(layer.inactive)))
                layer.deactivate()
            del layer.inactive[name]
    for where, module in list(model.named_modules(remove_duplicate=False)):
        if module in plain:
            model.set_submodule(where, plain[module])
    note_change()


def _check(model: nn.Module, name: str) -> dict[str, Linear_LORA]:
    """The model's LoRA layers, if it has an adapter of that name."""
    layers = needed_lora_layers(model)
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name must be a str, got {type(name).__name__}")
    if not any(name in layer.adapters() for layer in layers.values()):
        raise ValueError(f"there is no adapter {name!r}; the model has {lora_names(model)}")
    return layers


def _check_whole(model: nn.Module) -> None:
    if is_sharded(model):
        raise ValueError("this model is sharded: activate an adapter before sharding")


def _check_weights(weights: Sequence[float], names: Sequence[str]) -> None:
    if len(weights) != len(names):
        raise ValueError(f"weights must be {len(names)} numbers, one per name, got {weights!r}")
    for weight in weights:
        if isinstance(weight, bool) or not isinstance(weight, numbers.Real):
            raise TypeError(f"weights must be numbers, got {type(weight).__name__}")
        if not math.isfinite(weight):
            raise ValueError(f"weights must be finite, got {weight}")
