"""Adapters in a file: `NAME.lora_a.weight` and `NAME.lora_b.weight` of every LoRA layer, by its dotted name."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mllama.checkpoints.files import listing, save_tensors, write_file
from mllama.checkpoints.meta_source import MetaSource
from mllama.checkpoints.sources import SafetensorsSource, open_file
from mllama.lora.convert import linear_layers, put_adapters
from mllama.lora.layer import Linear_LORA, check_adapter, lora_layers, needed_lora_layers
from mllama.ops._dispatch import kind

_PARTS = ("lora_a", "lora_b")


def save_lora(model: nn.Module, path: str | os.PathLike) -> None:
    """Write the adapters to a safetensors file, whole or not at all, with the alpha of each. Its folder is made if absent.

    Raises:
        TypeError: model is no module.
        ValueError: it has no LoRA layers, or path is a folder.
    """
    layers = needed_lora_layers(model)
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"path must be a file, such as {path / 'adapters.safetensors'}; {path} is a folder")
    tensors = {_key(name, part): getattr(layer, part).weight.detach().cpu().clone() for name, layer in layers.items() for part in _PARTS}
    alphas = json.dumps({name: float(layer.alpha) for name, layer in layers.items()})
    write_file(path, lambda aside: save_tensors(aside, tensors, alpha=alphas))


def load_lora(model: nn.Module, path: str | os.PathLike) -> None:
    """Read adapters from a file of `save_lora`, or from a .pth of the same names.

    The values are cast to the adapters' dtype. A model without LoRA layers is converted as the file says: the layers it names, frozen but
    for adapters of its ranks and alphas, without dropout. A .pth does not know alphas, and takes a converted model. Merged layers are
    merged anew.

    Raises:
        FileNotFoundError: no such file.
        TypeError: model is no module.
        ValueError: a broken file, or one that holds anything but tensors; or the model and the file do not fit: every unknown or missing
            name, every other shape and every other alpha in one error, and nothing is loaded.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file of adapters")
    layers = lora_layers(model)
    tensors, alphas = _read(path)
    if layers:
        shapes = {_key(name, part): getattr(layer, part).weight.shape for name, layer in layers.items() for part in _PARTS}
        _check_fit(path, tensors, shapes)
        trained = {name: alphas.get(name, layer.alpha) for name, layer in layers.items()}
        if other := [f"{name} {alpha}, not {layers[name].alpha}" for name, alpha in trained.items() if alpha != layers[name].alpha]:
            raise ValueError(f"the adapters in {path} were trained with another alpha: {listing(other)}")
    else:
        layers = _convert(model, path, tensors, alphas)
    with torch.no_grad():
        for name, layer in layers.items():
            for part in _PARTS:
                getattr(layer, part).weight.copy_(tensors[_key(name, part)])
            if layer.merged_weight is not None:
                layer.merge()


def _convert(model: nn.Module, path: Path, tensors: Mapping[str, torch.Tensor], alphas: Mapping[str, float]) -> dict[str, Linear_LORA]:
    """Adapt the layers that the file names, where all of it fits."""
    if not alphas:
        raise ValueError(
            f"this {type(model).__name__} has no LoRA layers, and {path} does not say which alpha to make them with: call"
            " mllama.convert_linears_to_lora(model, rank, alpha) first"
        )
    chosen: dict[nn.Linear, tuple[int, float]] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, linear in linear_layers(model).items():
        down = tensors.get(_key(name, "lora_a"))
        if name and name in alphas and down is not None:  # a lone layer cannot be replaced from within
            rank = max([1, *down.shape[:1]])
            chosen[linear] = rank, alphas[name]
            shapes |= {_key(name, "lora_a"): (rank, linear.in_features), _key(name, "lora_b"): (linear.out_features, rank)}
    _check_fit(path, tensors, shapes)
    made = put_adapters(model, chosen)  # under each name of a layer, of which the file may have another than comes first here
    return {name: layer for name, layer in made.items() if _key(name, "lora_a") in tensors}


def _check_fit(path: Path, tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """One error of all that does not fit."""
    problems = {
        "not in the model": [name for name in tensors if name not in shapes],
        "not in the file": [name for name in shapes if name not in tensors],
        "of another shape or type": [
            f"{name} is {kind(tensors[name])}, not {list(shape)}"
            for name, shape in shapes.items()
            if name in tensors and (tensors[name].shape != shape or not tensors[name].is_floating_point())
        ],
    }
    if any(problems.values()):
        said = "; ".join(f"{what} ({len(names)}): {listing(names)}" for what, names in problems.items() if names)
        raise ValueError(f"the adapters in {path} do not fit: {said}")


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """The file's tensors, and the alpha of every layer where its metadata have them, as a JSON object."""
    with path.open("rb") as file:
        zipped = file.read(4) == b"PK\x03\x04"  # what torch.save writes
    if zipped:
        with MetaSource(str(path), [path]) as source:
            return {name: source.read(name) for name in source.headers()}, {}
    with open_file(path) as file:
        metadata, names = file.metadata() or {}, list(file.keys())
    with SafetensorsSource(str(path), dict.fromkeys(names, path)) as source:
        return {name: source.read(name) for name in source.headers()}, _alphas(path, metadata.get("alpha"))


def _alphas(path: Path, text: str | None) -> dict[str, float]:
    if text is None:
        return {}
    try:
        alphas: Any = json.loads(text)
        if not isinstance(alphas, dict):
            raise TypeError(f"an object is needed, got {type(alphas).__name__}")
        for alpha in alphas.values():
            check_adapter(1, alpha)
            float(alpha)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} has no valid alphas in its metadata: {error}") from error
    return alphas


def _key(name: str, part: str) -> str:
    return f"{name}.{part}.weight" if name else f"{part}.weight"
