"""Sources of tensors: names with shapes and dtypes first, from headers alone; then one tensor at a
time.
"""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

import torch
from safetensors import SafetensorError, safe_open

from mllama.checkpoints.files import INDEX, WEIGHTS, find_inside, listing, read_json

_TYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
_MAPPED = 2**28  # bytes read from a mapping before it is reopened


@dataclass(frozen=True)
class Header:
    """Shape and dtype of a tensor in a file.

    Attributes:
        shape, dtype: of what `Source.read` returns.
        blocks: GGUF's name of the blocks that the file has it in, as Q4_0; None where it has plain
            numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    blocks: str | None = None


class Reading(Protocol):
    """Reads one of a model's tensors."""

    def __call__(self, blocks: bool = False) -> torch.Tensor:
        """The tensor; with `blocks` the bytes of its blocks, uint8 [rows, bytes of a row], which
        only a tensor has whose header names them.
        """


# Called with a tensor's name in the model, what reads it, its header and the dtype that it shall
# have.
Taker = Callable[[str, Reading, Header, torch.dtype], bool]


class Source:
    """Tensors by their names in files. Leaving its context closes it.

    Attributes:
        where: the files, used in errors.
        mapped: whether `read` may return a view of the file's pages, which must be copied to be
            kept.
    """

    where: str
    mapped = False

    def headers(self) -> dict[str, Header]:
        """Every tensor's shape and dtype, in the best order for reading. No data is read."""
        raise NotImplementedError

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor, on the CPU."""
        raise NotImplementedError

    def read_blocks(self, name: str) -> torch.Tensor:
        """The bytes of a tensor whose header names blocks: uint8 [rows, bytes of a row]."""
        raise NotImplementedError

    def close(self) -> None:
        """Release the files. Idempotent."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class SafetensorsSource(Source):
    """One safetensors file, or the shards of an index."""

    mapped = True

    def __init__(self, where: str, files: dict[str, Path]):
        """
        Args:
            where: the folder, used in errors.
            files: the file of each tensor.
        """
        self.where = where
        self._files = files
        self._open: tuple[Path, safe_open] | None = None
        self._read = 0

    def headers(self) -> dict[str, Header]:
        """Every tensor's shape and dtype, file by file.

        Raises:
            ValueError: torch does not have the dtype.
        """
        found = {}
        for path in dict.fromkeys(self._files.values()):
            with open_file(path) as file:
                for name in file.offset_keys():  # in file order
                    header = file.get_slice(name)
                    if header.get_dtype() not in _TYPES:
                        raise ValueError(
                            f"{path}: {name} is of the type {header.get_dtype()}, which is not "
                            "known"
                        )
                    found[name] = Header(tuple(header.get_shape()), _TYPES[header.get_dtype()])
        return found

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor: a view of the mapped file.

        The mapping is reopened now and then, so that pages that were read do not stay in memory.
        """
        path = self._files[name]
        if self._open is None or self._open[0] != path or self._read > _MAPPED:
            self.close()
            self._open, self._read = (path, open_file(path)), 0
        tensor = self._open[1].get_tensor(name)
        self._read += tensor.nbytes
        return tensor

    def close(self) -> None:
        """Release the mapped file. Idempotent."""
        self._open = None


def pickled_weights(folder: Path) -> list[str]:
    """Names of a folder's files that have the suffixes of pickled weights."""
    patterns = ("*.bin", "*.pt", "*.pth")
    return [path.name for pattern in patterns for path in sorted(folder.glob(pattern))]


def refused_pickle(name: str) -> str:
    """What to say of such a file."""
    return f"{name} is a pickle, which is never opened: convert it to safetensors"


def open_safetensors(
    folder: str | Path, weights: str = WEIGHTS, index_name: str = INDEX
) -> SafetensorsSource:
    """Open the safetensors weights of a folder: the single file, or the shards in the index.

    The index and the files must agree on the location of every tensor; files outside the folder
    are not opened.

    Args:
        folder: the folder.
        weights, index_name: names of the single file and of the index.

    Raises:
        FileNotFoundError: there are no weights, or a shard is missing.
        ValueError: a file is broken, or the index names files outside the folder or contradicts
            them.
    """
    folder = Path(folder)
    if (folder / weights).is_file():
        path = find_inside(folder, weights)
        return SafetensorsSource(str(folder), dict.fromkeys(_names(path), path))
    if not (folder / index_name).is_file():
        pickled = pickled_weights(folder)
        ggufs = [path.name for path in sorted(folder.glob("*.gguf"))]
        hint = f"; {refused_pickle(pickled[0])}" if pickled else ""
        hint = f"; to load {ggufs[0]}, give its own path" if ggufs else hint
        raise FileNotFoundError(f"{folder} has neither {weights} nor {index_name}{hint}")
    index = find_inside(folder, index_name)
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(
        isinstance(shard, str) for shard in weight_map.values()
    ):
        raise ValueError(f"{index}: weight_map must be an object of tensor names and file names")
    found: dict[str, Path] = {}
    for shard in sorted(set(weight_map.values())):
        plain = (
            shard == os.path.basename(shard)
            and "\\" not in shard
            and shard.isprintable()
            and len(shard.encode()) < 256
        )
        if not plain or not shard.endswith(".safetensors"):
            raise ValueError(
                f"{index}: {shard!r} is not the name of a safetensors file inside the folder"
            )
        path = find_inside(folder, shard)
        for name in _names(path):
            if weight_map.get(name) != shard:
                raise ValueError(
                    f"{path} has {name!r}, which {index_name} places in "
                    f"{listing([weight_map.get(name, 'no file')])}"
                )
            found[name] = path
    if absent := sorted(weight_map.keys() - found.keys()):
        raise ValueError(f"{index} names tensors that its files do not hold: {listing(absent)}")
    return SafetensorsSource(str(folder), found)


def open_file(path: Path) -> safe_open:
    """Open a safetensors file; reads its header only.

    Raises:
        ValueError: it is not a valid safetensors file.
    """
    try:
        return safe_open(path, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{path} is not a valid safetensors file: {error}") from error


def _names(path: Path) -> list[str]:
    with open_file(path) as file:
        return list(file.keys())
