"""Loads adapters from a file into the LoRA layers of a model."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mllama.checkpoints.files import listing, listing_by_kind
from mllama.lora.adapter import DEFAULT, Adapter, Options, check_name, parts_of
from mllama.lora.adapters import (
    Adapters,
    adapter_key,
    plain_layers,
    plain_parameters,
    with_own_names,
)
from mllama.lora.convert import adaptable_layers, put_adapters, use_adapter
from mllama.lora.layer import Linear_LORA, active_name
from mllama.lora.named import lora_names
from mllama.lora.reading import Paths, read_adapters
from mllama.nn.adapted import note_change
from mllama.nn.wrappers import gathered, is_sharded, plain_name, put, whole
from mllama.ops._dispatch import kind

_Shapes = dict[str, tuple[int, ...]]
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_lora(model: nn.Module, path: str | os.PathLike, name: str | None = None) -> None:
    """Load an adapter into a model, all of it or nothing, and use it.

    If the model has no adapter of that name, it gets one: the layers that the file names get its
    ranks, alphas and dropout, and everything else is frozen. Other adapters stay. Values are cast
    to the adapters' dtype; merged layers are merged again. Names may be the model's own or those of
    transformers' class and its files, with or without the parts that torch.compile, DDP and FSDP
    add. Modules that PEFT trained as a whole (`modules_to_save`) replace the model's values and
    stay trainable.

    Args:
        model: a module, with or without LoRA layers.
        path: a file of `save_lora`, a PEFT folder or the file in it, or a .pth file with the same
            names. A .pth file has no alphas and needs a converted model.
        name: the adapter's. Default: the one in use, or "default" if there is none.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no adapters.
        TypeError: model is not a module.
        ValueError: the file is broken, has no adapters, or has other values than tensors; a field
            of PEFT's config is not supported; file and model do not match. One error lists every
            unknown or missing name, wrong shape, value that is not finite and different alpha. The
            file has other values for modules trained in full, which the model's other adapters
            belong to.
    """
    path = Path(path)
    name = name or active_name(model) or DEFAULT
    check_name(name)
    layers = plain_layers(model, name)
    found = _below_adapters(with_own_names(model, read_adapters(path)), plain_layers(model))
    shapes = _trained_shapes(model, found)
    _check_tied(model, path, found)
    _check_shared(model, path, found, name)
    if layers:
        _check_layers(
            path, found, {each: own.adapters()[name] for each, own in layers.items()}, shapes
        )
        if name != active_name(model):
            use_adapter(model, name)
    else:
        layers = _convert(model, path, found, shapes, name)
        found = _below_adapters(found, layers)
    with gathered(model, write=True), torch.no_grad():
        for each, layer in layers.items():
            for part, parameter in parts_of(layer).items():
                put(parameter, found.tensors[adapter_key(each, part)])
            if layer.merged_weight is not None:
                layer.merge()
        for each, parameter in plain_parameters(model).items():
            if each in found.trained:
                put(parameter, found.trained[each])
                parameter.requires_grad_(each not in found.frozen)
    note_change()


def load_adapters(model: nn.Module, adapters: Paths) -> None:
    """`load_lora` of one path, or of several by name, of which the first is used afterwards.

    Raises:
        ValueError: the mapping is empty; else as `load_lora`.
    """
    if not isinstance(adapters, Mapping):
        return load_lora(model, adapters)
    if not adapters:
        raise ValueError("adapter: the mapping has no adapters")
    for name, path in reversed([*adapters.items()]):  # the last one loaded is in use
        load_lora(model, path, name)


def _convert(
    model: nn.Module, path: Path, found: Adapters, trained_shapes: _Shapes, adapter: str
) -> dict[str, Linear_LORA]:
    """Give the layers that the file names an adapter of that name, if everything in it fits."""
    if not found.alphas:
        raise ValueError(
            f"this {type(model).__name__} has no adapter {adapter!r}, and {path} lacks the "
            "alpha to create it with: call mllama.convert_linears_to_lora(model, rank, alpha)"
        )
    if is_sharded(model):
        raise ValueError(
            "this model is sharded and has no such adapter: load or convert it before sharding"
        )
    chosen: dict[nn.Module, Options] = {}
    shapes = dict(trained_shapes)
    for name, linear in adaptable_layers(model).items():
        name = plain_name(model, name)
        down = found.tensors.get(adapter_key(name, "lora_a.weight"))
        if not name or name not in found.alphas or down is None:
            continue  # a lone layer, whose name is empty, cannot be replaced in place
        rank = max([1, *down.shape[:1]])
        dora = adapter_key(name, "lora_magnitude.weight") in found.tensors
        chosen[linear] = Options(rank, found.alphas[name], found.dropout, dora)
        shapes |= _adapter_shapes(name, rank, linear.in_features, linear.out_features, dora)
    _check_fit(path, found, shapes)
    # A shared layer appears under each of its names; the file may not use the first.
    converted = put_adapters(model, chosen, adapter)
    by_name = {plain_name(model, name): layer for name, layer in converted.items()}
    return {
        name: layer
        for name, layer in by_name.items()
        if adapter_key(name, "lora_a.weight") in found.tensors
    }


def _check_layers(
    path: Path,
    found: Adapters,
    layers: Mapping[str, Linear_LORA | Adapter],
    trained_shapes: _Shapes,
) -> None:
    """The file's names, shapes and alphas must be those of the adapter's layers."""
    shapes = dict(trained_shapes)
    for name, layer in layers.items():
        sizes = layer.lora_a.in_features, layer.lora_b.out_features
        shapes |= _adapter_shapes(name, layer.rank, *sizes, layer.lora_magnitude is not None)
    _check_fit(path, found, shapes)
    different = [
        f"{name} {found.alphas[name]}, not {layer.alpha}"
        for name, layer in layers.items()
        if name in found.alphas and not _close(found.alphas[name], layer.alpha)
    ]
    if different:
        raise ValueError(
            f"the adapters in {path} were trained with another alpha: {listing(different)}"
        )


def _adapter_shapes(name: str, rank: int, inputs: int, outputs: int, dora: bool) -> _Shapes:
    """Shapes of an adapter's parts, computed because FSDP may store a weight in another shape."""
    shapes: _Shapes = {"lora_a.weight": (rank, inputs), "lora_b.weight": (outputs, rank)}
    if dora:
        shapes["lora_magnitude.weight"] = (outputs,)
    return {adapter_key(name, part): shape for part, shape in shapes.items()}


def _trained_shapes(model: nn.Module, found: Adapters) -> _Shapes:
    """Shapes of the model's parameters that the file has next to adapters."""
    if not found.trained:
        return {}
    return {
        name: tuple(parameter.shape)
        for name, parameter in plain_parameters(model).items()
        if name in found.trained
    }


def _check_fit(path: Path, found: Adapters, shapes: _Shapes) -> None:
    """Raise one error that lists everything that does not fit."""
    tensors = found.tensors | found.trained
    problems = {
        "not in the model": [name for name in tensors if name not in shapes],
        "not in the file": [name for name in shapes if name not in tensors],
        "of another shape or type": [
            f"{name} is {kind(tensors[name])}, not {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors
            and (tensors[name].shape != shape or tensors[name].dtype not in _DTYPES)
        ],
    }
    problems["not finite"] = [  # in float32, the dtype of adapters
        name
        for name, tensor in tensors.items()
        if tensor.dtype in _DTYPES and not torch.isfinite(tensor.float()).all()
    ]
    if message := listing_by_kind(problems):
        raise ValueError(f"the adapters in {path} do not fit: {message}")


def _check_tied(model: nn.Module, path: Path, found: Adapters) -> None:
    """PEFT trains a copy of a tied parameter; here all of its names would change. Frozen values
    that equal the model's are fine.
    """
    tied: dict[nn.Parameter, list[str]] = {}
    for name, parameter in plain_parameters(model).items():
        tied.setdefault(parameter, []).append(name)
    for parameter, names in tied.items():
        in_file = [name for name in names if name in found.trained]
        values = [found.trained[name] for name in in_file]
        if found.frozen.issuperset(in_file) and all(_equals(parameter, v) for v in values):
            continue
        if values and (
            len(values) < len(names) or not all(torch.equal(values[0], v) for v in values[1:])
        ):
            raise ValueError(
                f"modules_to_save in {path}: {' and '.join(names)} are one parameter in this "
                "model, and the file has different values"
            )


def _check_shared(model: nn.Module, path: Path, found: Adapters, adapter: str) -> None:
    """Modules trained in full belong to the model: another adapter's must be the same."""
    others = sorted({*lora_names(model)} - {adapter})
    different = [
        name
        for name, parameter in plain_parameters(model).items()
        if others and name in found.trained and not _equals(parameter, found.trained[name])
    ]
    if different:
        raise ValueError(
            f"{path} changes {listing(different)}, which the model's other adapters "
            f"({', '.join(others)}) belong to"
        )


def _equals(parameter: nn.Parameter, value: torch.Tensor) -> bool:
    if parameter.is_meta:  # has no values yet
        return value.shape == parameter.shape
    return value.shape == parameter.shape and torch.equal(value.to(parameter), whole(parameter))


def _below_adapters(found: Adapters, layers: Mapping[str, Linear_LORA]) -> Adapters:
    """Weights of a layer with adapters are its `linear`'s in the model, one level below PEFT's
    names.
    """

    def moved(name: str) -> str:
        owner, _, leaf = name.rpartition(".")
        return f"{owner}.linear.{leaf}" if owner in layers else name

    trained = {moved(name): tensor for name, tensor in found.trained.items()}
    return replace(found, trained=trained, frozen=frozenset(map(moved, found.frozen)))


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= 1e-6 * abs(other)  # rsLoRA's alphas are multiplied by a root
