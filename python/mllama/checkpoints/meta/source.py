"""Tensors of Meta's consolidated.*.pth, merged from parallel shards. Only plain tensors are read
from these pickles.
"""

import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from mllama.checkpoints.files import find_inside, listing
from mllama.checkpoints.sources import Header, Source

_MAPPED = (
    2**26
    # Bytes read from a mapping before it is reopened, or a 32nd of the files: reopening reads the
    # pickles again.
)

# The axis along which Meta's parallel layers split a tensor. Tensors that match no pattern are
# whole in every shard.
_CUT = (
    (
        0,
        re.compile(
            r"(.*\.)?(w[qkv13]|c_fc|_linear|vision_projection|output|tok_embeddings"
            r"|learnable_embedding)\.(weight|bias)"
        ),
    ),
    (1, re.compile(r"(.*\.)?(wo|w2|c_proj)\.weight")),
)


class MetaSource(Source):
    """The tensors of consolidated.*.pth. Parallel shards are merged one tensor at a time.

    Only plain tensors are read from the pickles; any other content is rejected, without a fallback.
    """

    def __init__(self, where: str, paths: Sequence[Path]):
        """
        Args:
            where: the folder, used in errors.
            paths: the shards, in order.

        Raises:
            ValueError: a shard has other content, or the shards are not parts of one model.
        """
        self.where = where
        self.mapped = len(paths) == 1  # merged tensors have memory of their own
        self._paths = tuple(paths)
        self._open: dict[Path, dict[str, torch.Tensor]] = {}
        self._read, self._keep = (
            0,
            max(_MAPPED, sum(path.stat().st_size for path in self._paths) // 32),
        )
        shards = [
            {
                name: Header(tuple(part.shape), part.dtype)
                for name, part in self._parts(path).items()
            }
            for path in self._paths
        ]
        for path, headers in zip(self._paths[1:], shards[1:], strict=True):
            if other := sorted(
                name
                for name in headers.keys() | shards[0].keys()
                if headers.get(name) != shards[0].get(name)
            ):
                raise ValueError(
                    f"{path} is no part of the same model as {self._paths[0].name}: they differ in "
                    f"{listing(other)}"
                )
        self._headers = {name: self._whole(name, header) for name, header in shards[0].items()}

    def headers(self) -> dict[str, Header]:
        """Every merged tensor's shape and dtype, in file order."""
        return self._headers

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor: a view of the mapping for a single file, which is reopened now and then;
        else a tensor of its own.
        """
        axis = _axis(name)
        parts = [
            self._parts(path)[name]
            for path in (self._paths if axis is not None else self._paths[:1])
        ]
        tensor = (
            torch.cat(parts, axis)
            if len(parts) > 1
            else parts[0]
            if self.mapped
            else parts[0].clone()
        )
        self._read += tensor.nbytes
        if self._read > self._keep:
            self.close()
        return tensor

    def same(self, name: str, other: str) -> bool:
        """Whether two tensors, split along the same axis, are equal."""
        if self._headers[name] != self._headers[other]:
            return False
        pairs = ((self._parts(path)[name], self._parts(path)[other]) for path in self._paths)
        equal = all(
            torch.equal(one[:1], two[:1]) and torch.equal(one, two) for one, two in pairs
        )  # most differ in the first row
        self.close()
        return equal

    def close(self) -> None:
        """Release the mapped files. Idempotent."""
        self._open, self._read = {}, 0

    def _parts(self, path: Path) -> dict[str, torch.Tensor]:
        if path not in self._open:
            self._open[path] = _load(path)
        return self._open[path]

    def _whole(self, name: str, part: Header) -> Header:
        axis = _axis(name)
        shape = [
            size * len(self._paths) if place == axis else size
            for place, size in enumerate(part.shape)
        ]
        return Header(tuple(shape), part.dtype)


def _axis(name: str) -> int | None:
    return next((axis for axis, pattern in _CUT if pattern.fullmatch(name)), None)


def find_shards(folder: Path) -> list[Path]:
    """The folder's weight files, in order.

    Raises:
        FileNotFoundError: there are none, or one is missing.
        ValueError: file names are not Meta's.
    """
    names = sorted(path.name for path in folder.glob("consolidated*.pth"))
    if not names:
        raise FileNotFoundError(f"{folder} has params.json but no consolidated.00.pth")
    if names != ["consolidated.pth"]:
        numbered = [f"consolidated.{number:02d}.pth" for number in range(len(names))]
        if missing := [name for name in numbered if name not in names]:
            raise FileNotFoundError(f"{folder} has {listing(names)}, but no {listing(missing)}")
    return [find_inside(folder, name) for name in names]


def _load(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .pth file, memory-mapped.

    Raises:
        ValueError: it is not an archive of torch.save, contains anything but tensors by name, or
            claims more tensors than its size allows.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                raise ValueError("it is compressed, which torch.save never does")
        content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except UnpicklingError as error:
        found = re.search(r"GLOBAL (?!was )(\S+)", str(error))
        raise ValueError(
            f"{path} holds something else than tensors{f' ({found[1]})' if found else ''}, and is "
            "not read"
        ) from error
    except Exception as error:  # of a broken file anything may come
        raise ValueError(f"{path} is no archive that torch.save wrote: {error}") from error
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and _is_plain(value) for name, value in content.items()
    ):
        raise ValueError(f"{path} must hold dense tensors by their names, and nothing else")
    # Two names may share memory, as tied tensors do; many of them could exhaust the memory from a
    # small file.
    if (
        sum(tensor.nbytes for name, tensor in content.items() if not name.endswith("output.weight"))
        > path.stat().st_size
    ):
        raise ValueError(
            f"{path} claims more tensors than its {path.stat().st_size} bytes can hold"
        )
    return {name: tensor.detach() for name, tensor in content.items()}


def _is_plain(value: Any) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
    )
