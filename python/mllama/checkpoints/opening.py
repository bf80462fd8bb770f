"""Detects what a path contains: a Hugging Face folder of a known `model_type`, Meta's own files, or
a GGUF file.
"""

import contextlib
import dataclasses
from pathlib import Path

from mllama.checkpoints.files import (
    CONFIG,
    INDEX,
    PACKED_INDEX,
    PACKED_WEIGHTS,
    find_gguf,
    find_inside,
    read_json,
)
from mllama.checkpoints.meta.reader import PARAMS, open_meta
from mllama.checkpoints.opened import Opened, check_config
from mllama.checkpoints.sources import open_safetensors
from mllama.config.packing import split_packing
from mllama.families import compose, family_of
from mllama.weights.family import Config
from mllama.weights.rows import Rename

GENERATION = "generation_config.json"
_ADAPTERS = (".safetensors", ".pth", ".bin")  # suffixes of adapter files
_WEIGHT_FILES = ("*.safetensors", INDEX, PACKED_INDEX, "consolidated*.pth", "*.gguf")


def open_checkpoint(path: str | Path, config: Config | None = None) -> Opened:
    """Detect a path's format and open it. Reads headers, no tensors.

    Args:
        path: a folder with config.json and safetensors weights, one with Meta's params.json, a
            GGUF file, or a folder whose only model file is one.
        config: replaces config.json's content.

    Raises:
        FileNotFoundError: the path does not exist, or has no model file.
        ValueError: the model_type is unknown, a file is broken, the config is invalid, or the
            folder has several models.
        TypeError: config is another family's.
    """
    path = Path(path)
    before = _stamps(path)
    return dataclasses.replace(_open(path, config), changed=lambda: _stamps(path) != before)


def config_alone(folder: Path) -> Config | None:
    """The complete config of a folder with config.json and no weights; None for any other.

    Raises:
        ValueError: the model_type is unknown, or the config is invalid.
    """
    bare = (folder / CONFIG).is_file() and not any(
        any(folder.glob(pattern)) for pattern in _WEIGHT_FILES
    )
    if not bare:
        return None
    with _named(folder / CONFIG):
        content = read_json(find_inside(folder, CONFIG))
        compose(content)
        return family_of(content).from_json(content)


def _stamps(path: Path) -> dict[Path, tuple[int, int, int]]:
    """Stamps of the weight files, which change if a file is replaced or written to."""
    files = (
        [path]
        if path.is_file()
        else [file for pattern in _WEIGHT_FILES for file in path.glob(pattern)]
    )
    found = {}
    for file in files:
        with contextlib.suppress(OSError):  # removed meanwhile, or a dangling link
            status = file.stat()
            found[file] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def _open(path: Path, config: Config | None) -> Opened:
    if (file := find_gguf(path)) is not None:
        # Imported here: the gguf library is an optional dependency.
        from mllama.checkpoints.gguf.reader import open_gguf

        return open_gguf(file, config)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"no model folder {str(path)!r}")
        hint = (
            "; adapters are loaded onto a model: --adapter, or adapter= of mllama.load"
            if path.suffix in _ADAPTERS
            else ""
        )
        raise FileNotFoundError(f"{path} is neither a model folder nor a .gguf file{hint}")
    if (path / PARAMS).exists() and not (path / CONFIG).exists():
        if config is not None:
            raise ValueError(f"{path}: config cannot replace {PARAMS}")
        return open_meta(path)
    return _open_folder(path, config)


def _open_folder(folder: Path, config: Config | None) -> Opened:
    content = read_json(find_inside(folder, CONFIG))
    with _named(folder / CONFIG):
        content, packing = split_packing(content)
        family = family_of(content)
        if config is None:
            compose(content)  # before the weights, so that errors come at once
    if config is not None:
        check_config(config, family)
    generation = (
        read_json(find_inside(folder, GENERATION)) if (folder / GENERATION).exists() else None
    )
    given = content if config is None else config
    if packing is None:
        return Opened.of(given, open_safetensors(folder), generation=generation)
    source = open_safetensors(folder, PACKED_WEIGHTS, PACKED_INDEX)
    own_names = (Rename("*", "*"),)
    opened = Opened.of(given, source, lambda spec: own_names, generation)
    return dataclasses.replace(opened, packing=packing)


@contextlib.contextmanager
def _named(path: Path):
    """Prefix errors with a path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
