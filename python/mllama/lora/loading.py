"""Loads adapters from a file into the LoRA layers of a model."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from mllama.checkpoints.files import listing
from mllama.lora.adapters import (
    PARTS,
    Adapters,
    adapter_key,
    plain_layers,
    plain_parameters,
    with_own_names,
)
from mllama.lora.convert import Options, linear_layers, put_adapters
from mllama.lora.layer import Linear_LORA
from mllama.lora.reading import read_adapters
from mllama.nn.adapted import note_change
from mllama.nn.packed import PackedLinear
from mllama.nn.wrappers import gathered, is_sharded, plain_name, put, whole
from mllama.ops._dispatch import kind

_Shapes = dict[str, tuple[int, ...]]


def load_lora(model: nn.Module, path: str | os.PathLike) -> None:
    """Load adapters into a model, all or none.

    A model without LoRA layers is converted: the layers that the file names get its ranks, alphas
    and dropout, and everything else is frozen. Values are cast to the adapters' dtype; merged
    layers are merged again. Names may be the model's own or those of transformers' class and its
    files, with or without the parts that torch.compile, DDP and FSDP add. Modules that PEFT trained
    as a whole (`modules_to_save`) replace the model's values and stay trainable.

    Args:
        model: a module, with or without LoRA layers.
        path: a file of `save_lora`, a PEFT folder or the file in it, or a .pth file with the same
            names. A .pth file has no alphas and needs a converted model.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no adapters.
        TypeError: model is not a module.
        ValueError: the file is broken, has no adapters, or has other values than tensors; a field
            of PEFT's config is not supported; file and model do not match. One error lists every
            unknown or missing name, wrong shape and different alpha.
    """
    path = Path(path)
    layers = plain_layers(model)
    found = _below_adapters(with_own_names(model, read_adapters(path)), layers)
    shapes = _trained_shapes(model, found)
    _check_tied(model, path, found)
    if layers:
        _check_layers(path, found, layers, shapes)
    else:
        layers = _convert(model, path, found, shapes)
        found = _below_adapters(found, layers)
    with gathered(model, write=True), torch.no_grad():
        for name, layer in layers.items():
            for part in PARTS:
                put(getattr(layer, part).weight, found.tensors[adapter_key(name, part)])
            if layer.merged_weight is not None:
                layer.merge()
        for name, parameter in plain_parameters(model).items():
            if name in found.trained:
                put(parameter, found.trained[name])
                parameter.requires_grad_(name not in found.frozen)
    note_change()


def _convert(
    model: nn.Module, path: Path, found: Adapters, trained_shapes: _Shapes
) -> dict[str, Linear_LORA]:
    """Convert the layers that the file names, if everything in it fits."""
    if not found.alphas:
        raise ValueError(
            f"this {type(model).__name__} has no LoRA layers, and {path} does not say which alpha "
            "to create them with: call mllama.convert_linears_to_lora(model, rank, alpha) first"
        )
    if is_sharded(model):
        raise ValueError(
            "this model is sharded and has no LoRA layers: load or convert it before sharding"
        )
    chosen: dict[nn.Module, Options] = {}
    shapes = dict(trained_shapes)
    for name, linear in linear_layers(model).items():
        name = plain_name(model, name)
        down = found.tensors.get(adapter_key(name, "lora_a"))
        if not name or name not in found.alphas or down is None:
            continue  # a lone layer, whose name is empty, cannot be replaced in place
        rank = max([1, *down.shape[:1]])
        chosen[linear] = Options(rank, found.alphas[name], found.dropout)
        shapes |= _adapter_shapes(name, rank, linear)
    _check_fit(path, found, shapes)
    # A shared layer appears under each of its names; the file may not use the first.
    converted = put_adapters(model, chosen)
    by_name = {plain_name(model, name): layer for name, layer in converted.items()}
    return {
        name: layer
        for name, layer in by_name.items()
        if adapter_key(name, "lora_a") in found.tensors
    }


def _check_layers(
    path: Path, found: Adapters, layers: Mapping[str, Linear_LORA], trained_shapes: _Shapes
) -> None:
    """The file's names, shapes and alphas must be those of the LoRA layers."""
    shapes = dict(trained_shapes)
    for name, layer in layers.items():
        shapes |= _adapter_shapes(name, layer.rank, layer)
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


def _adapter_shapes(name: str, rank: int, layer: nn.Linear | PackedLinear | Linear_LORA) -> _Shapes:
    """Shapes of A and B, computed because FSDP may store a weight in another shape."""
    return {
        adapter_key(name, "lora_a"): (rank, layer.in_features),
        adapter_key(name, "lora_b"): (layer.out_features, rank),
    }


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
            and (tensors[name].shape != shape or not tensors[name].is_floating_point())
        ],
    }
    message = "; ".join(
        f"{what} ({len(names)}): {listing(names)}" for what, names in problems.items() if names
    )
    if message:
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


def _equals(parameter: nn.Parameter, value: torch.Tensor) -> bool:
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
