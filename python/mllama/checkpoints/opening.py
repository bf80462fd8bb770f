"""What a path holds: a Hugging Face folder of a known `model_type`, Meta's own files, or a GGUF
file.
"""

import contextlib
import copy
import dataclasses
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

from mllama.checkpoints.files import CONFIG, INDEX, find_gguf, find_inside, read_json
from mllama.checkpoints.meta.reader import PARAMS, open_meta
from mllama.checkpoints.sources import open_safetensors
from mllama.config.files import harmless
from mllama.families import (
    gemma,
    gemma2,
    gemma3,
    llama,
    llava,
    mllama,
    paligemma,
    siglip,
    siglip_llama,
)
from mllama.weights.format import Format, Opened

FORMATS = {
    "gemma": gemma.FORMAT,
    "gemma2": gemma2.FORMAT,
    "gemma3_text": gemma3.FORMAT,
    "llama": llama.FORMAT,
    "llava": llava.FORMAT,
    "mllama": mllama.FORMAT,
    "paligemma": paligemma.FORMAT,
    "siglip": siglip.WHOLE,
    "siglip_llama": siglip_llama.FORMAT,
    "siglip_vision_model": siglip.FORMAT,
}
GENERATION = "generation_config.json"
_ADAPTERS = (".safetensors", ".pth", ".bin")  # what files of adapters are called
_WEIGHT_FILES = ("*.safetensors", INDEX, "consolidated*.pth", "*.gguf")


def open_checkpoint(path: str | Path, config: PretrainedConfig | None = None) -> Opened:
    """Find out what a path holds, and open it. Headers are read and no tensor.

    Args:
        path: a folder with config.json and safetensors weights, one with Meta's params.json, a GGUF
            file, or a folder whose only model file is one.
        config: takes the place of config.json's; a copy of it, since a model writes into its own.

    Raises:
        FileNotFoundError: nothing there, or no model file in it.
        ValueError: an unknown model_type, a broken file, a config that cannot be, several models in
            one folder.
        TypeError: a config of another kind.
    """
    path, config = Path(path), copy.deepcopy(config)
    before = _stamps(path)
    return dataclasses.replace(_open(path, config), changed=lambda: _stamps(path) != before)


def config_alone(folder: Path) -> PretrainedConfig | None:
    """The config of a folder that holds config.json and no weights; None of any other.

    Raises:
        ValueError: an unknown model_type, or a config that cannot be.
    """
    bare = (folder / CONFIG).is_file() and not any(
        any(folder.glob(pattern)) for pattern in _WEIGHT_FILES
    )
    return _read_config(folder)[1] if bare else None


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


def _open(path: Path, config: PretrainedConfig | None) -> Opened:
    if (file := find_gguf(path)) is not None:
        from mllama.checkpoints.gguf.reader import (
            open_gguf,
        )  # here, since its library is an optional dependency

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


def _open_folder(folder: Path, config: PretrainedConfig | None) -> Opened:
    form, config = _read_config(folder, config)
    generation = (
        read_json(find_inside(folder, GENERATION)) if (folder / GENERATION).exists() else None
    )
    return Opened(config, form.table(config), open_safetensors(folder), generation)


def _read_config(
    folder: Path, config: PretrainedConfig | None = None
) -> tuple[Format, PretrainedConfig]:
    """What config.json says; of the config what is given in its place."""
    content = read_json(find_inside(folder, CONFIG))
    form = _format_named(content)
    if config is None:
        try:
            config = form.from_file(harmless(content))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{folder / CONFIG}: {error}") from error
    elif not any(
        isinstance(one, form.config_class) for one in (config, siglip_llama.written_as(config))
    ):
        raise TypeError(
            f"config must be a {form.config_class.__name__} or None, got {type(config).__name__}"
        )
    return form, config


def config_arguments(content: dict[str, Any]) -> dict[str, Any]:
    """The arguments of `MllamaConfig` from the content of a config.json of our own format, or of a
    LLaVA that such a model can be.

    Fields that could steer what code runs are left out.

    Raises:
        ValueError: another `model_type`, or a LLaVA that is no SigLIP + Llama.
    """
    content = harmless(content)
    return (
        siglip_llama.arguments_from_llava(content)
        if _format_named(content) is llava.FORMAT
        else content
    )


def _format_named(content: dict[str, Any]) -> Format:
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise ValueError(
            f"config.json: model_type {kind!r} is not known; known are {', '.join(sorted(FORMATS))}"
        )
    return FORMATS[kind]
