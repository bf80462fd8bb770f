"""Reads adapter files and PEFT folders to `Adapters`, with the file's own names."""

import json
from pathlib import Path
from typing import Any

import torch

from mllama.checkpoints.files import listing
from mllama.checkpoints.meta.source import MetaSource
from mllama.checkpoints.sources import SafetensorsSource, open_file
from mllama.lora import peft
from mllama.lora.adapter import check_adapter
from mllama.lora.adapters import Adapters


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
    if tensors and not any(".lora_" in f".{name}" for name in tensors):
        raise ValueError(
            f"{path} has no adapters: its {len(tensors)} tensors are "
            f"{listing(list(tensors)[:3])} ..., the weights of a model"
        )
    return Adapters(tensors, _parse_alphas(path, alphas))


def _file_in(folder: Path) -> Path:
    if (folder / peft.CONFIG).exists():
        return peft.weights_file(folder)
    if (folder / "config.json").exists():
        raise ValueError(
            f"{folder} has no adapters but a whole model: it has config.json and no {peft.CONFIG}"
        )
    raise FileNotFoundError(
        f"{folder} is no file of adapters, and as a folder it has no {peft.CONFIG}"
    )


def _parse_peft(folder: Path, path: Path, tensors: dict[str, torch.Tensor]) -> Adapters:
    if not (folder / peft.CONFIG).exists():
        raise ValueError(
            f"{path} has PEFT adapters and needs {peft.CONFIG} next to it, for ranks and alphas"
        )
    config = peft.read_config(folder)
    tensors, alphas, trained = peft.parse(str(folder), config, tensors)
    frozen = frozenset(name for name in trained if not peft.learns(config, name))
    return Adapters(tensors, alphas, trained, float(config.get("lora_dropout") or 0.0), frozen)


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
