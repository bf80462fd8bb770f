"""Reads adapter files and PEFT folders to `Adapters`, with the file's own names."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mllama.checkpoints.files import listing
from mllama.checkpoints.meta.source import MetaSource
from mllama.checkpoints.sources import SafetensorsSource, open_file
from mllama.lora import peft
from mllama.lora.adapter import DEFAULT, check_adapter, check_name
from mllama.lora.adapters import Adapters

Paths = str | os.PathLike | Mapping[str, str | os.PathLike]  # one adapter, or several by name


def read_adapters(path: Path) -> Adapters:
    """Read a file of `save_lora`, a PEFT folder or the file in it, or a .pth file.

    Raises:
        FileNotFoundError: there is no such file, or the folder has no adapters.
        ValueError: the file is broken or has no adapters, or a PEFT field is not supported.
    """
    folder = path if path.is_dir() else path.parent
    if path.is_dir():
        path = _file_in(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is no file of adapters")
    tensors, alphas = _open(path)
    if peft.is_peft(tensors):
        return _parse_peft(folder, path, tensors)
    if not any(".lora_" in f".{name}" for name in tensors):
        raise ValueError(
            f"{path} has no adapters: its {len(tensors)} tensors are "
            f"{listing(list(tensors)[:3])} ..., the weights of a model"
            if tensors
            else f"{path} has no adapters: it has no tensors"
        )
    pickled = alphas is None and path.suffix != ".safetensors"
    found = Adapters(tensors, _parse_alphas(path, alphas), format="pth" if pickled else "mllama")
    if lone := sorted(found.alphas.keys() - found.layers()):
        raise ValueError(f"{path} has alphas of {listing(lone)}, but no tensors")
    return found


def find_base(folder: Path, adapters: Paths | None) -> tuple[str | None, Paths | None]:
    """The base model that a folder of adapters names, and these; None and `adapters` for any other
    path.

    Raises:
        TypeError: adapters are no path or paths by name.
        ValueError: the folder has adapters, and `adapters` names others; it names no base model.
    """
    for each in adapters.values() if isinstance(adapters, Mapping) else [adapters]:
        if not isinstance(each, (str, os.PathLike, type(None))):
            raise TypeError(f"adapter must be a str, a path or None, got {type(each).__name__}")
    if not (saved := saved_adapters(folder)):
        return None, adapters
    if adapters is not None:
        raise ValueError(
            f"{folder} holds adapters, and adapter names others: give the model's own folder with "
            "one of them"
        )
    paths = [*saved.values()]
    return peft.adapted_model(paths[0]), saved if len(paths) > 1 else paths[0]


def saved_adapters(folder: Path) -> dict[str, Path]:
    """The adapters that a folder was saved with, by name, as PEFT lays them out: "default" in the
    folder itself, others in folders of their names. A Trainer's checkpoints are none of them.
    """
    whole = (folder / "config.json").exists() and not (folder / peft.CONFIG).exists()
    if whole or not folder.is_dir():
        return {}
    inside = [folder] + sorted(path for path in folder.glob("*/") if _may_be_name(path.name))
    names = [DEFAULT, *(path.name for path in inside[1:])]
    return {
        name: path
        for name, path in zip(names, inside, strict=True)
        if (path / peft.CONFIG).is_file()
    }


def _may_be_name(name: str) -> bool:
    try:
        check_name(name)
    except ValueError:
        return False
    return name != DEFAULT and not re.fullmatch(r"checkpoint-\d+", name)


def _file_in(folder: Path) -> Path:
    if (folder / peft.CONFIG).exists():
        return peft.weights_file(folder)
    if (folder / "config.json").exists():
        raise ValueError(
            f"{folder} has no adapters but a whole model: it has config.json and no {peft.CONFIG}"
        )
    inside = ", ".join(map(str, saved_adapters(folder).values()))
    raise FileNotFoundError(
        f"{folder} is no file of adapters, and as a folder it has no {peft.CONFIG}"
        f"{'; there are some in ' * bool(inside)}{inside}"
    )


def _parse_peft(folder: Path, path: Path, tensors: dict[str, torch.Tensor]) -> Adapters:
    if not (folder / peft.CONFIG).exists():
        raise ValueError(
            f"{path} has PEFT adapters and needs {peft.CONFIG} next to it, for ranks and alphas"
        )
    config = peft.read_config(folder)
    tensors, alphas, trained = peft.parse(str(folder), config, tensors)
    frozen = frozenset(name for name in trained if not peft.learns(config, name))
    dropout = float(config.get("lora_dropout") or 0.0)
    base = config.get("base_model_name_or_path") or None
    return Adapters(tensors, alphas, trained, dropout, frozen, "peft", base)


def _open(path: Path) -> tuple[dict[str, torch.Tensor], str | None]:
    """The tensors of a file, and the alphas in its metadata as JSON."""
    with path.open("rb") as file:
        start = file.read(4)
    if start == b"GGUF":
        raise ValueError(f"{path} is a GGUF file of a model; adapters are not read from GGUF")
    if start == b"PK\x03\x04":  # written by torch.save
        with MetaSource(str(path), [path]) as source:
            return {name: source.read(name) for name in source.headers()}, None
    with open_file(path) as file:
        metadata, names = file.metadata() or {}, list(file.keys())
    with SafetensorsSource(str(path), dict.fromkeys(names, path)) as source:
        return {name: source.read(name) for name in source.headers()}, metadata.get("alpha")


def _parse_alphas(path: Path, text: str | None) -> dict[str, float]:
    if text is None:
        return {}
    try:
        alphas: Any = json.loads(text)
        if not isinstance(alphas, dict):
            raise TypeError(f"expected an object, got {type(alphas).__name__}")
        for alpha in alphas.values():
            check_adapter(1, alpha)
            float(alpha)
    except (ValueError, TypeError, RecursionError, OverflowError) as error:
        raise ValueError(f"{path} has no valid alphas in its metadata: {error}") from error
    return alphas
