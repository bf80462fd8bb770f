"""Rows in files: JSON lines, a JSON array, CSV, and folders of images by class.

Each class is a list of rows that are read when they are asked for, and can be pickled for the
workers of a data loader.
"""

import csv
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mllama.data.rows import COLUMNS, READ
from mllama.processing.image import FORMATS
from mllama.processing.image_source import shorten

MAX_ROW_BYTES = 2**28  # of a line of JSON
_BLOCK = 2**24  # bytes
BOM = b"\xef\xbb\xbf"


class Rows:
    """Rows of a source.

    Attributes:
        name: of the source, in errors.
        unread: names of columns that have no meaning here.
    """

    name: str
    unread: list[str]
    _rows: Sequence[Any]

    def __len__(self) -> int:
        return len(self._rows)

    def where(self, index: int) -> str:
        """The source and the row's number, counted from 1."""
        return f"{self.name}, row {index + 1}"

    def row(self, index: int) -> Any:
        """The row's fields. Raises ValueError if it cannot be read."""
        return self._rows[index]


class JsonLines(Rows):
    """One JSON object per line. Opening the file reads it once, to find the lines; empty lines are
    no rows, but are counted in the rows' numbers.

    Args:
        path: the file.

    Raises:
        OSError: the file cannot be read.
        ValueError: it has no rows.
    """

    def __init__(self, path: Path):
        self._path, self.name = path, path.name
        self._state = _state(os.stat(path))
        starts, ends = _lines(path)
        filled = np.flatnonzero(~_blank(path, starts, ends))
        if not len(filled):
            raise ValueError(f"{path} has no rows")
        self._filled, self._rows = filled, np.stack([starts[filled], ends[filled]], 1)
        self.unread = _unread(self)

    def where(self, index: int) -> str:
        return super().where(self._filled[index])

    def row(self, index: int) -> Any:
        start, end = self._rows[index].tolist()
        size = end - start
        if size > MAX_ROW_BYTES:
            raise ValueError(f"the row has {size} bytes, more than {MAX_ROW_BYTES}")
        with open(self._path, "rb") as file:
            if _state(os.fstat(file.fileno())) != self._state:
                raise ValueError("the file was changed since it was opened")
            file.seek(start)
            return parse_json(file.read(size))


class JsonArray(Rows):
    """A file with one JSON array of objects, as LLaVA's own data has. It is read at once."""

    def __init__(self, path: Path):
        self.name = path.name
        try:
            self._rows = parse_json(path.read_bytes().removeprefix(BOM))
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
        if not isinstance(self._rows, list) or not self._rows:
            raise ValueError(f"{path} must hold a list of rows, and at least one")
        self.unread = _unread(self)


class CsvRows(Rows):
    """A CSV file with a header that names at least `answer`, and may name `question` and
    `image`. Texts are read at once.

    Raises:
        OSError: the file cannot be read.
        ValueError: the header is missing, a name comes twice, quotes are broken, or there are no
            rows.
    """

    def __init__(self, path: Path):
        self.name = path.name
        # Bytes that are not UTF-8 become surrogates, which are rejected with their row.
        with open(path, encoding="utf-8-sig", errors="surrogateescape", newline="") as file:
            reader = csv.reader(file, strict=True)
            try:
                header = [name.strip() for name in next(reader, [])]
                self._names = _check_header(path, header)
                self.unread = [name for name in header if name not in self._names]
                places = [header.index(name) for name in self._names]
                self._rows = list(_cells(reader, len(header), places))
            except csv.Error as error:
                # Where a quote is not closed, no later row can be told from it.
                raise ValueError(f"{path}, line {reader.line_num}: {error}") from error
        if not self._rows:
            raise ValueError(f"{path} has no rows below its header")

    def row(self, index: int) -> Any:
        cells = self._rows[index]
        if isinstance(cells, str):
            raise ValueError(cells)
        return dict(zip(self._names, cells, strict=True))


class ClassFolders(Rows):
    """A folder of folders of images; a folder's name is the answer for its images.

    Args:
        path: the folder. Names that begin with a dot are left out.

    Raises:
        ValueError: there is no image.
    """

    def __init__(self, path: Path):
        self.name, self.unread = path.name, []
        found = [
            os.path.join(entry.name, inner.name) if inner else entry.name
            for entry in _entries(path)
            for inner in (_entries(entry.path) if entry.is_dir() else [None])
        ]
        self._rows = sorted(found)
        if not self._rows:
            raise ValueError(f"{path} has no folders with images")

    def where(self, index: int) -> str:
        return f"{super().where(index)} ({shorten(self._rows[index])})"

    def row(self, index: int) -> Any:
        name = Path(self._rows[index])
        if len(name.parts) != 2:
            raise ValueError("an image must lie in a folder of its class")
        if name.suffix.lower() not in _suffixes():
            raise ValueError("it is no image by its name")
        return {"image": str(name), "answer": name.parts[0]}


def parse_json(data: bytes) -> Any:
    """Strict JSON: UTF-8, no name twice in an object, no NaN or infinity.

    Raises:
        ValueError: the data is something else, or nested too deep.
    """
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8, at byte {error.start}") from None
    try:
        return json.loads(text, object_pairs_hook=_object, parse_constant=_no_constant)
    except RecursionError:
        raise ValueError("its lists or objects are nested too deep") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"it is not JSON: {error.msg}, at character {error.pos + 1}") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the name {shorten(twice, 40)!r} twice")
    return fields


def _no_constant(name: str) -> Any:
    raise ValueError(f"it is not JSON: {name} is no number of it")


def _state(state: os.stat_result) -> tuple[int, int]:
    return state.st_size, state.st_mtime_ns


def _lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """int64 [lines]: where each line starts and ends, without its line break and a BOM."""
    found, offset, bom = [], 0, 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            if not offset and block.startswith(BOM):
                bom = len(BOM)
            found.append(np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n")) + offset)
            offset += len(block)
    breaks = np.concatenate([*found, [offset]]).astype(np.int64)  # the last line may have no break
    starts = np.concatenate([[bom], breaks[:-1] + 1]).astype(np.int64)
    return starts, breaks


def _blank(path: Path, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool [lines]: whether a line is empty, but for a carriage return."""
    blank = ends <= starts
    with open(path, "rb") as file:
        for index in np.flatnonzero(ends - starts == 1):
            file.seek(int(starts[index]))
            blank[index] = file.read(1) == b"\r"
    return blank


def _unread(rows: Rows) -> list[str]:
    """Names in the first row that have no meaning here; none if it cannot be read."""
    try:
        row = rows.row(0)
    except ValueError:
        return []
    return [name for name in row if name not in READ] if isinstance(row, Mapping) else []


def _check_header(path: Path, header: list[str]) -> list[str]:
    """The columns that are read."""
    names: list[str] = [name for name in COLUMNS if name in header]
    shown = ", ".join(shorten(name, 20) for name in header[:10]) or "nothing"
    if "answer" not in names:
        raise ValueError(
            f"{path} needs a first line with the columns' names, image, question, answer, "
            f"separated by commas; got {shown}"
        )
    if twice := [name for name in names if header.count(name) > 1]:
        raise ValueError(f"{path} has the column {twice[0]} twice")
    return names


def _cells(reader: Any, count: int, places: list[int]) -> Iterator[tuple[str | None, ...] | str]:
    """The cells at `places` of each row, None for empty ones; of a row with another number of
    cells, what is wrong.
    """
    for cells in reader:
        if not cells:  # an empty line
            continue
        if len(cells) != count:
            yield f"it has {len(cells)} cells, the header {count}"
        else:
            yield tuple(cells[place] or None for place in places)


def _entries(folder: str | Path) -> list[os.DirEntry]:
    return [entry for entry in os.scandir(folder) if not entry.name.startswith(".")]


def _suffixes() -> set[str]:
    """File names' endings of the formats that are read."""
    return {end for end, kind in Image.registered_extensions().items() if kind in FORMATS}
