"""Files of a model folder: reading JSON, checking paths, and atomic writes."""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
# Packed weights have a name of their own: stock transformers would load the others' names, find
# none of its tensors, and go on with random ones.
PACKED_WEIGHTS, PACKED_INDEX = "packed.safetensors", "packed.safetensors.index.json"
_ENTRIES = (WEIGHTS, INDEX, PACKED_WEIGHTS, PACKED_INDEX)  # what readers look for
_LISTED = 30  # maximum number of names of one kind in an error
_ALIGNMENT = 64  # of packed weights in a file
_TYPE_NAMES = {
    torch.uint8: "U8",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float32: "F32",
}
_JSON_MAX = 2**26  # bytes; the index of the largest models is well below 2**24


def find_inside(folder: Path, name: str) -> Path:
    """The path of a regular file inside the folder.

    A symbolic link may not leave the folder, except in the layout of Hugging Face's cache: from
    models--NAME/snapshots/REVISION to models--NAME/blobs, or to blobs that models share, next to
    models--NAME.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a regular file, or lies outside the folder.
    """
    path = folder / name
    if not path.exists():
        raise FileNotFoundError(f"{folder} has no {name}")
    if not path.is_file():
        raise ValueError(f"{path} is not a regular file")
    home, real = folder.resolve(), path.resolve()
    if not any(real.is_relative_to(place) for place in (home, *_blobs(home))):
        raise ValueError(f"{path} is a link to {real}, which lies outside the folder")
    return path


def find_gguf(path: Path) -> Path | None:
    """The GGUF file at a path, or in a folder without another model; None if there is none.

    Raises:
        ValueError: there are several.
    """
    if path.suffix == ".gguf" and path.is_file():
        return path
    found = sorted(file.name for file in path.glob("*.gguf"))
    if not found or any((path / name).exists() for name in (CONFIG, "params.json")):
        return None
    if len(found) > 1:
        raise ValueError(f"{path} has several GGUF files, name one: {listing(found)}")
    return find_inside(path, found[0])


def _blobs(folder: Path) -> list[Path]:
    """The blob folders of a snapshot in Hugging Face's cache, or of a folder inside it."""
    for snapshots, repository in zip(folder.parents, folder.parents[1:], strict=False):
        if snapshots.name == "snapshots" and repository.name.startswith("models--"):
            return [(home / "blobs").resolve() for home in (repository, repository.parent)]
    return []


def listing(names: list[str]) -> str:
    """Names for an error: all of them, or the first ones and the number of others; escaped for
    terminals.
    """
    names = [name if name.isprintable() else repr(name) for name in names]
    more = f" ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def listing_by_kind(kinds: Mapping[str, list[str]]) -> str:
    """`listing` of each kind that has names, after the kind and their number; "" if none has."""
    return "; ".join(
        f"{kind} ({len(names)}): {listing(names)}" for kind, names in kinds.items() if names
    )


def read_json(path: Path) -> dict:
    """Read a JSON object from a file.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not a JSON object, or is too large.
    """
    if path.stat().st_size > _JSON_MAX:
        raise ValueError(f"{path} has {path.stat().st_size} bytes; at most {_JSON_MAX} are read")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: dict) -> None:
    """Write a JSON object to a file, indented, with sorted names."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], max_shard_size: int | str) -> None:
    """Write tensors under the given names: one file, or shards with an index if they exceed
    `max_shard_size`.
    """
    _save_shards(folder, "model", INDEX, tensors, max_shard_size, save_tensors)


def save_packed(folder: Path, tensors: dict[str, torch.Tensor], max_shard_size: int | str) -> None:
    """`save_weights` of a packed model's state dict: the weights' bytes first, from a multiple of
    64 bytes on, so that kernels read them well from a mapping of the file.
    """
    _save_shards(folder, "packed", PACKED_INDEX, tensors, max_shard_size, _save_aligned)


def _save_shards(
    folder: Path,
    stem: str,
    index: str,
    tensors: dict[str, torch.Tensor],
    max_shard_size: int | str,
    save: Callable[[Path, dict[str, torch.Tensor]], None],
) -> None:
    from huggingface_hub import split_torch_state_dict_into_shards

    # On the meta device nothing shares memory, as views of a mapped file do.
    split = split_torch_state_dict_into_shards(
        {name: tensor.to("meta") for name, tensor in tensors.items()},
        filename_pattern=f"{stem}{{suffix}}.safetensors",
        max_shard_size=max_shard_size,
    )
    for shard, names in split.filename_to_tensors.items():
        save(folder / shard, {name: tensors[name] for name in names})
    if split.is_sharded:
        write_json(
            folder / index, {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        )


def _save_aligned(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write a safetensors file in an order of our own, which the library does not offer: packed
    weights, whose sizes are multiples of 32 bytes, then the others by their dtypes' sizes.
    """

    def order(name: str) -> tuple[bool, int]:
        tensor = tensors[name]
        return tensor.dtype != torch.uint8 or tensor.nbytes % 32 != 0, -tensor.itemsize

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    names, end = sorted(tensors, key=order), 0
    for name in names:
        tensor, start = tensors[name], end
        end += tensor.nbytes
        kind, shape = _TYPE_NAMES[tensor.dtype], list(tensor.shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % _ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            plain = tensors[name].detach().cpu().contiguous().flatten()
            file.write(plain.view(torch.uint8).numpy())


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> None:
    """Write a safetensors file, with metadata in addition to `format`. Tensors that are the same
    memory are written each: the file has no place for what they share.
    """
    written: dict[int, str] = {}
    plain = {name: tensor.contiguous() for name, tensor in tensors.items()}
    for name, tensor in plain.items():
        if written.setdefault(tensor.data_ptr(), name) != name:  # which the library refuses
            plain[name] = tensor.clone()
    path.touch()
    mode = path.stat().st_mode  # follows the umask; safetensors' own file is private to the owner
    save_file(plain, path, metadata={"format": "pt"} | metadata)
    path.chmod(mode)


def check_free(target: Path, force: bool, suffix: str | None = None) -> None:
    """Check, before a model is read, that a command can write there and overwrites nothing.

    Args:
        target: OUT of the command.
        force: --force: what is there may be overwritten.
        suffix: of a file. Default: target is a folder.

    Raises:
        ValueError: target has another suffix, or is a folder instead of a file or the reverse.
        FileExistsError: the file exists, or the folder is not empty, without `force`.
    """
    is_file = suffix is not None
    if is_file and target.suffix != suffix:
        raise ValueError(f"OUT must be a file that ends in {suffix}, got {target}")
    if target.exists() and target.is_dir() == is_file:
        raise ValueError(f"OUT must be a {'file' if is_file else 'folder'}, and {target} is none")
    if not force and target.exists() and (is_file or any(target.iterdir())):
        raise FileExistsError(
            f"{target} exists{'' if is_file else ' and is not empty'}; --force writes over it"
        )


def write_folder(
    folder: Path, write: Callable[[Path], None], replaced: Collection[str] = ()
) -> None:
    """Write a folder atomically: `write` fills a temporary folder, which is then moved into place.
    Readers see all of it or none, even after a crash.

    A new folder is renamed at once. Into an existing one files are moved one by one; the weights'
    entry point (the single file or the index) is removed first and placed last. Weight files of an
    earlier save and those in `replaced` are removed, other files stay. Removed files are kept in a
    hidden folder until all is in place, and restored on an error; only a crash of the process
    leaves that folder behind.
    """
    folder = Path(os.path.abspath(folder))
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} exists and is not a folder")
    fresh = not folder.exists()
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = (folder.parent if fresh else folder) / f".{folder.name}-{uuid.uuid4().hex}"
    aside.mkdir()
    try:
        write(aside)
        for path in aside.iterdir():
            _sync(path)
        if fresh:
            _sync(aside)
            aside.rename(folder)
            _sync(folder.parent)
        else:
            _move_into(aside, folder, replaced)
    finally:
        _remove(aside)


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Write a file atomically: `write` fills a temporary file, which is then renamed. The folder is
    created if needed.
    """
    path = Path(os.path.abspath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.parent / f".{path.name}-{uuid.uuid4().hex}"
    try:
        write(aside)
        _sync(aside)
        os.replace(aside, path)
        _sync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def _move_into(aside: Path, folder: Path, more: Collection[str]) -> None:
    def entry_last(name: str) -> tuple[bool, str]:
        return name in _ENTRIES, name

    new = sorted((path.name for path in aside.iterdir()), key=entry_last)
    replaced = {
        *new,
        *more,
        *_ENTRIES,
        *(path.name for path in folder.glob("model-*-of-*.safetensors")),
        *(path.name for path in folder.glob("packed-*-of-*.safetensors")),
    }
    there = (
        name
        for name in replaced
        if (folder / name).is_file() or (name in more and (folder / name).is_dir())
    )
    old = sorted(there, key=entry_last, reverse=True)
    backup = folder / f"{aside.name}-old"
    backup.mkdir()
    try:
        for name in old:
            os.replace(folder / name, backup / name)
        for name in new:
            os.replace(aside / name, folder / name)
        _sync(folder)
    except BaseException:
        # The location of each file tells what was done: an interrupt may come right after a rename.
        for name in reversed(new):
            if not (aside / name).exists() and (folder / name).exists():
                os.replace(folder / name, aside / name)
        for name in sorted((path.name for path in backup.iterdir()), key=entry_last):
            os.replace(backup / name, folder / name)
        backup.rmdir()
        raise
    _remove(backup)


def _remove(folder: Path) -> None:
    """Remove a folder, wholly where an interrupt comes meanwhile: models take long."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _sync(path: Path) -> None:
    """Flush a file or folder to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
