"""Reading and writing weight folders: renaming tables, strict accounting, shards, and writes that are whole or absent.

A table is a list of rows, one per group of tensors; it is read from top to bottom, and the first row that knows a name decides. Only
safetensors files are opened: pickle runs code.
"""

import json
import os
import shutil
import uuid
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

WEIGHTS, INDEX, CONFIG = "model.safetensors", "model.safetensors.index.json", "config.json"
_LISTED = 30  # names of one kind that an error lists


@dataclass(frozen=True)
class Rename:
    """Tensors that only change their names. `*` stands for the same rest on both sides, layer numbers included.

    Attributes:
        ours: the name in the model's memory.
        theirs: the name written to files.
        also: further spellings that files are known to have; read, never written.
    """

    ours: str
    theirs: str
    also: tuple[str, ...] = ()

    def read(self, name: str) -> str | None:
        """Our name of a file's tensor; None where this row does not know it."""
        return next((found for spelling in (self.theirs, *self.also) if (found := _move(name, spelling, self.ours))), None)

    def write(self, name: str) -> str | None:
        """The file's name of our tensor; None where this row does not know it."""
        return _move(name, self.ours, self.theirs)


@dataclass(frozen=True)
class Drop:
    """Tensors of files that the model has no use for: read past, never written."""

    theirs: str

    def read(self, name: str) -> str | None:
        """The empty name for a tensor to read past; None where this row does not know it."""
        return None if _move(name, self.theirs, "*") is None else ""

    def write(self, name: str) -> str | None:
        """None: nothing is written."""
        return None


Table = Iterable[Rename | Drop]


def _move(name: str, pattern: str, target: str) -> str | None:
    head, star, tail = pattern.partition("*")
    if not star:
        return target if name == pattern else None
    if not (name.startswith(head) and name.endswith(tail) and len(name) > len(head) + len(tail)):
        return None
    return target.replace("*", name[len(head) : len(name) - len(tail)])


def our_name(table: Table, name: str) -> str | None:
    """The model's name of a file's tensor, "" for one to read past, None for one that no row knows."""
    return next((found for row in table if (found := row.read(name)) is not None), None)


def file_name(table: Table, name: str) -> str:
    """The file's name of the model's tensor.

    Raises:
        ValueError: no row knows it.
    """
    for row in table:
        if (found := row.write(name)) is not None:
            return found
    raise ValueError(f"no place in the file format for the model's tensor {name!r}")


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it is not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got {type(content).__name__}")
    return content


def write_json(path: Path, content: dict) -> None:
    """A JSON object as a file, indented, names sorted."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def find_weights(folder: Path) -> dict[str, Path]:
    """Every tensor name of a folder's weights, and the file that holds it.

    Raises:
        FileNotFoundError: there are no safetensors weights, or a shard is missing.
        ValueError: a file is broken, a shard's name leaves the folder, or index and shards disagree.
    """
    if (folder / WEIGHTS).is_file():
        return {name: folder / WEIGHTS for name in _names(folder / WEIGHTS)}
    index = folder / INDEX
    if not index.is_file():
        pickled = [path.name for pattern in ("*.bin", "*.pt", "*.pth") for path in sorted(folder.glob(pattern))]
        hint = f"; {pickled[0]} is a pickle, which is never opened: convert it to safetensors" if pickled else ""
        raise FileNotFoundError(f"{folder} holds neither {WEIGHTS} nor {INDEX}{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise ValueError(f"{index}: weight_map must be an object of tensor names and file names")
    found: dict[str, Path] = {}
    for shard in sorted(set(weight_map.values())):
        inside = shard == os.path.basename(shard) and "\\" not in shard
        if not inside or not shard.isprintable() or not shard.endswith(".safetensors"):
            raise ValueError(f"{index}: {shard!r} is not the name of a safetensors file inside the folder")
        for name in _names(folder / shard):
            if weight_map.get(name) != shard:
                raise ValueError(f"{folder / shard} holds {name!r}, which {INDEX} places in {weight_map.get(name, 'no file')}")
            found[name] = folder / shard
    if absent := sorted(weight_map.keys() - found.keys()):
        raise ValueError(f"{index} names tensors that its files do not hold: {_listing(absent)}")
    return found


def _open(path: Path, device: str = "cpu"):
    try:
        return safe_open(path, framework="pt", device=device)
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error


def _names(path: Path) -> list[str]:
    with _open(path) as file:
        return list(file.keys())


def _listing(names: list[str]) -> str:
    more = f" ... and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def load_weights(
    model: torch.nn.Module,
    folder: Path,
    table: Table,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    optional: dict[str, str] | None = None,
    files: dict[str, Path] | None = None,
) -> None:
    """Put a folder's tensors in the place of the model's parameters, which may be on the meta device: memory holds them once.

    Args:
        model: whose state dict names and shapes are the measure.
        folder: with the weights.
        table: between the files' names and the model's.
        dtype: of the loaded floating tensors; None is the one that most of the files' elements have.
        device: where they go.
        optional: tensors that files may leave out because they are another one's (tied): {name: the other's name}. A file that holds both
            must hold them equal.
        files: what `find_weights` says of the folder, where that is known already.

    Raises:
        ValueError: a tensor is missing, unexpected, of another shape or kind, or comes twice: one error with every list. Or a broken file.
        FileNotFoundError: no weights.
    """
    optional = optional or {}
    files = find_weights(folder) if files is None else files
    places, common = _match(model.state_dict(), folder, files, table, optional)
    loaded: dict[str, torch.Tensor] = {}
    for path in sorted({path for _, path in places.values()}):
        with _open(path, str(device)) as file:
            for ours, (name, home) in places.items():
                if home == path:  # a copy: the file's own pages may be mapped here, and would change or vanish with it
                    loaded[ours] = file.get_tensor(name).to(dtype or common, copy=True)
    for name, other in optional.items():
        if name not in loaded:
            loaded[name] = loaded[other]
        elif not torch.equal(loaded[name], loaded[other]):
            raise ValueError(f"{folder}: {places[name][0]} and {places[other][0]} differ, but the config says they are one (tied)")
    torch.nn.Module.load_state_dict(model, loaded, strict=True, assign=True)


# Names of safetensors, and what they are loaded as: the operators take no float64.
_DTYPES = {"F64": torch.float32, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def _match(
    wanted: dict[str, torch.Tensor], folder: Path, files: dict[str, Path], table: Table, optional: dict[str, str]
) -> tuple[dict[str, tuple[str, Path]], torch.dtype]:
    """Where each tensor of the model is found, {our name: (the file's name, the file)}, and the dtype that most of their elements have.

    Only headers are read. Raises ValueError as `load_weights` says.
    """
    places: dict[str, tuple[str, Path]] = {}
    unexpected, unfit, twice = [], [], []
    elements = dict.fromkeys(_DTYPES.values(), 0)
    for name, path in files.items():
        ours = our_name(table, name)
        if ours == "":
            continue
        if ours not in wanted:
            unexpected.append(name)
        elif ours in places:
            twice.append(f"{places[ours][0]} and {name}")
        else:
            places[ours] = (name, path)
    for path in sorted({path for _, path in places.values()}):
        with _open(path) as file:
            for ours, (name, home) in places.items():
                if home == path:
                    header = file.get_slice(name)
                    shape, kind, expected = header.get_shape(), header.get_dtype(), list(wanted[ours].shape)
                    if shape != expected or kind not in _DTYPES:
                        unfit.append(f"{name} is {kind} {shape}, the model takes floating {expected}")
                    else:
                        elements[_DTYPES[kind]] += wanted[ours].numel()
    missing = [file_name(table, name) for name in wanted if name not in places and name not in optional]
    kinds = {"missing": missing, "unexpected": unexpected, "of another shape or kind": unfit, "given twice": twice}
    if any(kinds.values()):
        found = "; ".join(f"{kind} ({len(names)}): {_listing(names)}" for kind, names in kinds.items() if names)
        raise ValueError(f"the weights in {folder} do not fit the model. Tensors {found}")
    return places, max(elements, key=elements.get)


def check_complete(given: Iterable[str], needed: Iterable[str], known: Iterable[str]) -> None:
    """Refuse a state dict that is not the whole model.

    Raises:
        ValueError: with the names that are missing and those that are not known.
    """
    kinds = {"lacks": sorted(set(needed) - set(given)), "has, unknown to the model,": sorted(set(given) - set(known))}
    if any(kinds.values()):
        found = "; ".join(f"{kind} ({len(names)}): {_listing(names)}" for kind, names in kinds.items() if names)
        raise ValueError(f"state_dict is not this model's: it {found}")


def common_dtype(tensors: dict[str, torch.Tensor], default: torch.dtype) -> torch.dtype:
    """The floating dtype that most of the tensors' elements have: what `load_weights` takes for "auto"."""
    elements: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    return max(elements, key=elements.get, default=default)


def save_weights(folder: Path, tensors: dict[str, torch.Tensor], max_shard_size: int | str) -> None:
    """Write tensors under the given names: one file, or shards and their index where they exceed `max_shard_size`."""
    split = split_torch_state_dict_into_shards(tensors, filename_pattern="model{suffix}.safetensors", max_shard_size=max_shard_size)
    for shard, names in split.filename_to_tensors.items():
        (folder / shard).touch()
        mode = (folder / shard).stat().st_mode  # as the umask has it; safetensors' own file is the owner's alone
        save_file({name: tensors[name].contiguous() for name in names}, folder / shard, metadata={"format": "pt"})
        (folder / shard).chmod(mode)
    if split.is_sharded:
        write_json(folder / INDEX, {"metadata": split.metadata, "weight_map": split.tensor_to_filename})


def write_folder(folder: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder aside, then put it in place: a reader finds all of it or none, and so does who comes after a crash.

    A new folder is renamed into place at once. Into an existing one the files are moved with the weights' entry point (the single file or
    the index) removed first and placed last; other files stay, weight files of an earlier save go. What they replace is kept in a hidden
    folder beside them until all is in place, and moved back on an error; only a crash of the process leaves that folder there.
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
            _move_into(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _move_into(aside: Path, folder: Path) -> None:
    def entry_last(name: str) -> tuple[bool, str]:
        return name in (WEIGHTS, INDEX), name

    new = sorted((path.name for path in aside.iterdir()), key=entry_last)
    replaced = {*new, WEIGHTS, INDEX, *(path.name for path in folder.glob("model-*-of-*.safetensors"))}
    old = sorted((name for name in replaced if (folder / name).is_file()), key=entry_last, reverse=True)
    backup = folder / f"{aside.name}-old"
    backup.mkdir()
    try:
        for name in old:
            os.replace(folder / name, backup / name)
        for name in new:
            os.replace(aside / name, folder / name)
        _sync(folder)
    except BaseException:
        # Where each file is now says what was done: an interrupt may come after a rename and before any note of it.
        for name in reversed(new):
            if not (aside / name).exists():
                (folder / name).unlink(missing_ok=True)
        for name in sorted((path.name for path in backup.iterdir()), key=entry_last):
            os.replace(backup / name, folder / name)
        backup.rmdir()
        raise
    shutil.rmtree(backup, ignore_errors=True)


def _sync(path: Path) -> None:
    """Have a file's or a folder's content on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
