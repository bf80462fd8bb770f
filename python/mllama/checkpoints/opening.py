"""What a path holds: a Hugging Face folder of a known `model_type`, Meta's own files, or a GGUF
file.
"""

import contextlib
import dataclasses
from pathlib import Path

from mllama.checkpoints.files import CONFIG, INDEX, find_gguf, find_inside, read_json
from mllama.checkpoints.meta.reader import PARAMS, open_meta
from mllama.checkpoints.opened import Opened, check_config
from mllama.checkpoints.sources import open_safetensors
from mllama.families import compose, family_of
from mllama.weights.family import Config

GENERATION = "generation_config.json"
_ADAPTERS = (".safetensors", ".pth", ".bin")  # what files of adapters are called
_WEIGHT_FILES = ("*.safetensors", INDEX, "consolidated*.pth", "*.gguf")


def open_checkpoint(path: str | Path, config: Config | None = None) -> Opened:
    """Find out what a path holds, and open it. Headers are read and no tensor.

    Args:
        path: a folder with config.json and safetensors weights, one with Meta's params.json, a GGUF
            file, or a folder whose only model file is one.
        config: takes the place of config.json's content.

    Raises:
        FileNotFoundError: nothing there, or no model file in it.
        ValueError: an unknown model_type, a broken file, a config that cannot be, several models in
            one folder.
        TypeError: a config of another family.
    """
    path = Path(path)
    before = _stamps(path)
    return dataclasses.replace(_open(path, config), changed=lambda: _stamps(path) != before)


def config_alone(folder: Path) -> Config | None:
    """The complete config of a folder that holds config.json and no weights; None of any other.

    Raises:
        ValueError: an unknown model_type, or a config that cannot be.
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
    """What tells a weight file from another that takes its place, or from itself written to."""
    files = (
        [path]
        if path.is_file()
        else [file for pattern in _WEIGHT_FILES for file in path.glob(pattern)]
    )
    found = {}
    for file in files:
        with contextlib.suppress(OSError):  # gone meanwhile, or a link to nothing
            status = file.stat()
            found[file] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def _open(path: Path, config: Config | None) -> Opened:
    if (file := find_gguf(path)) is not None:
        # Here, since its library is an optional dependency.
        from mllama.checkpoints.gguf.reader import open_gguf

        return open_gguf(file, config)
    if not path.is_dir():
        if not path.exists():
            raise FileNotFoundError(f"no model folder {str(path)!r}")
        hint = (
            "; adapters go beside a model: --adapter, or adapter= of mllama.load"
            if path.suffix in _ADAPTERS
            else ""
        )
        raise FileNotFoundError(f"{path} is neither a model folder nor a .gguf file{hint}")
    if (path / PARAMS).exists() and not (path / CONFIG).exists():
        if config is not None:
            raise ValueError(f"{path}: a config cannot take the place of what {PARAMS} says")
        return open_meta(path)
    return _open_folder(path, config)


def _open_folder(folder: Path, config: Config | None) -> Opened:
    content = read_json(find_inside(folder, CONFIG))
    with _named(folder / CONFIG):
        family = family_of(content)
        if config is None:
            compose(content)  # before the weights: an error should not take their time
    if config is not None:
        check_config(config, family)
    generation = (
        read_json(find_inside(folder, GENERATION)) if (folder / GENERATION).exists() else None
    )
    given = content if config is None else config
    return Opened.of(given, open_safetensors(folder), generation=generation)


@contextlib.contextmanager
def _named(path: Path):
    """Prefix errors with the file's path."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
