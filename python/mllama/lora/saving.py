"""Saves the adapters of a model to a file, or to a folder in PEFT's format."""

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn

from mllama.checkpoints.files import listing, save_tensors, write_file
from mllama.lora import peft
from mllama.lora.adapter import DEFAULT, options_of, parts_of
from mllama.lora.adapters import adapter_key, part_keys, plain_layers, plain_parameters
from mllama.lora.layer import Linear_LORA, active_name, needed_lora_layers
from mllama.lora.named import lora_names
from mllama.nn.wrappers import gathered, may_write, plain_key, plain_name, unwrapped, whole

FORMATS = ("mllama", "peft")


def save_lora(
    model: nn.Module, path: str | os.PathLike, format: str = "mllama", name: str | None = None
) -> None:
    """Write an adapter atomically. The folder is created if needed.

    Names that torch.compile, DDP and FSDP add are stripped. If the model is sharded over
    processes, every process must call this; the first one writes.

    Args:
        model: a module with LoRA layers.
        path: a safetensors file, or a folder for PEFT's format.
        format: "mllama": one file with the adapters and the alpha of each layer, and a warning if
            other parameters can be trained, which it has no place for. "peft": a folder
            that `peft.PeftModel` loads onto this model or transformers' own class of it, with the
            modules that were trained next to the adapters.
        name: which adapter. Default: the one in use.

    Raises:
        TypeError: model is not a module.
        ValueError: model has no LoRA layers, or no adapter of that name; format is unknown; path is
            a folder instead of a file or the reverse, or a folder that holds a whole model; in
            PEFT's format, trained parameters in the same module as adapters, or magnitudes (DoRA)
            in some layers alone.
    """
    needed_lora_layers(model)
    name, path = name or str(active_name(model)), Path(path)
    if not (layers := plain_layers(model, name)):
        raise ValueError(f"name: the model has no adapter {name!r}")
    if format not in FORMATS:
        raise ValueError(f"format must be one of {', '.join(FORMATS)}, got {format!r}")
    if format == "peft":
        return save_adapter_folder(model, path, name)
    if path.is_dir():
        raise ValueError(
            f"path must be a file, such as {path / 'adapters.safetensors'}; {path} is a folder"
        )
    modules, loose = _trained_beside(model)
    if beside := modules + loose:
        warnings.warn(
            f"mllama's format has no place for {listing(beside)}, which can be trained beside the "
            "adapter: freeze them, or save in PEFT's format",
            stacklevel=2,
        )
    with gathered(model):
        tensors = _adapter_tensors(layers, name)
        alphas = {each: float(layer.adapters()[name].alpha) for each, layer in layers.items()}
        if may_write(model):
            metadata = json.dumps(alphas)
            write_file(path, lambda aside: save_tensors(aside, tensors, alpha=metadata))


def save_adapter_folders(
    model: nn.Module,
    folder: Path,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    strict: bool = True,
) -> None:
    """Save every adapter as PEFT does: the one called "default" in the folder, others in folders of
    their names in it. A single adapter is saved in the folder itself.

    Arguments as `save_adapter_folder`.
    """
    names = lora_names(model)
    for name in names:
        inside = folder if name == DEFAULT or len(names) == 1 else folder / name
        save_adapter_folder(model, inside, name, state_dict, strict)


def save_adapter_folder(
    model: nn.Module,
    folder: Path,
    name: str,
    state_dict: Mapping[str, torch.Tensor] | None = None,
    strict: bool = True,
) -> None:
    """`save_lora` in PEFT's format.

    If other adapters were added to the model's weights permanently, the folder names no base
    model, because no file holds those weights.

    Args:
        name: the adapter's.
        state_dict: replaces the model's own. It is whole, so no other process takes part.
        strict: False warns instead of raising if PEFT could not read all of it; mllama can.
    """
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"path must be a folder in PEFT's format; {folder} is a file")
    inner, layers = unwrapped(model), plain_layers(model, name)
    modules, loose = _trained_beside(model)
    if loose:
        message = (
            "PEFT's format does not support trained parameters in the same module as adapters: "
            f"{listing(loose)}"
        )
        if strict:
            raise ValueError(f"{message}. Freeze them, or save them separately")
        warnings.warn(f"{message}. They are written for mllama to read", stacklevel=4)
    with gathered(model) if state_dict is None else nullcontext():
        if state_dict is None:
            values: Mapping[str, torch.Tensor] = plain_parameters(model)
            tensors = _adapter_tensors(layers, name)
        else:
            values = {plain_key(key): tensor for key, tensor in state_dict.items()}
            keys = part_keys(layers, name)
            tensors = {key: _value(values, own) for key, own in keys.items()}
        inside = tuple(f"{name}." for name in modules)
        trained = {
            each: _copied(tensor)
            for each, tensor in values.items()
            if each in loose or each.startswith(inside)
        }
        stock_name = getattr(inner, "stock_name", str)
        if may_write(model):
            options = {each: options_of(layer.adapters()[name]) for each, layer in layers.items()}
            peft.write(folder, options, tensors, trained, modules, stock_name, _base_model(inner))


def _trained_beside(model: nn.Module) -> tuple[list[str], list[str]]:
    """Names of modules trained as a whole, and of other trained parameters."""
    adapters: Iterable[nn.Parameter] = [
        parameter
        for layer in plain_layers(model).values()
        for adapter in layer.adapters().values()
        for parameter in parts_of(adapter).values()
    ]
    modules, loose = peft.trained_whole(model, adapters)
    return [plain_name(model, name) for name in modules], [
        plain_name(model, name) for name in loose
    ]


def _base_model(inner: nn.Module) -> str | None:
    # Adapters were added to the weights permanently: the checkpoint has others.
    if any("holds_adapter" in vars(module) for module in inner.modules()):
        return None
    return getattr(getattr(inner, "config", None), "name_or_path", None) or None


def _adapter_tensors(layers: Mapping[str, Linear_LORA], adapter: str) -> dict[str, torch.Tensor]:
    return {
        adapter_key(name, part): _copied(parameter)
        for name, layer in layers.items()
        for part, parameter in parts_of(layer.adapters()[adapter]).items()
    }


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return whole(tensor.detach()).cpu().clone()


def _value(state_dict: Mapping[str, torch.Tensor], key: str) -> torch.Tensor:
    if key not in state_dict:
        raise ValueError(f"state_dict does not belong to this model: it lacks {key}")
    return _copied(state_dict[key])
