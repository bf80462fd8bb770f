"""Opens training data of any form as a sequence of examples."""

import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from mllama.data.files import BOM, ClassFolders, CsvRows, JsonArray, JsonLines, Rows
from mllama.data.hub_rows import HubRows, is_saved
from mllama.data.images import ImageFinder
from mllama.data.rows import Example, read_row
from mllama.processing.image import load_image

_FILES = (".jsonl", ".ndjson", ".json", ".csv")
_ID = re.compile(r"[\w][\w.-]*(/[\w.-]+)?")


class Examples(Sequence[Example]):
    """Examples that are read when they are asked for, with a ValueError that names the file and the
    row if one is invalid.

    Attributes:
        bad_rows: what was wrong with each row that was left out.
        unread: fields of the (first) rows that have no meaning here.
    """

    def __init__(self, rows: Rows, images: ImageFinder, question: str | None = None):
        self._rows, self._images, self._question = rows, images, question
        self._indices = np.arange(len(rows))
        self.bad_rows: list[str] = []
        self.unread = rows.unread

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        row = int(self._indices[index])
        where = self._rows.where(row)
        try:
            fields = self._rows.row(row)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error
        return read_row(fields, where, self._images, self._question)

    def leave_out_bad(self, check: Callable[[Example], Any], most: int | None = None) -> "Examples":
        """Leave out the rows that are invalid or that `check` raises ValueError for, and note them
        in `bad_rows`. Reads every row. Returns self.

        Args:
            check: for training `Collator.encode`, so that no row fails later.
            most: keep the first valid rows alone, at most so many, and read no row after them.

        Raises:
            ValueError: no row is left.
        """
        good = []
        for place, index in enumerate(self._indices):
            if len(good) == most:
                break
            try:
                check(self[place])
                good.append(index)
            except ValueError as error:
                self.bad_rows.append(str(error))
        if not good:
            raise ValueError(f"all {len(self)} rows are bad; the first: {self.bad_rows[0]}")
        self._indices = np.array(good)
        return self


def open_examples(
    source: str | os.PathLike,
    image_folder: str | os.PathLike | None = None,
    question: str | None = None,
    split: str | None = None,
    skip_bad_rows: bool = False,
) -> Examples:
    """Open training data. Rows are read when they are asked for; images are not read at all.

    Args:
        source: a .jsonl or .json file in LLaVA's or OpenAI's form or of question and answer, a
            .csv file of image, question, answer, a folder of folders of images (the answer is the
            folder's name), a folder of the datasets library, or its id on the hub.
        image_folder: images' paths are relative to it, and may not leave it. Default: the file's
            folder; none for an id.
        question: the question of rows that have an answer alone.
        split: the split of a data set of the datasets library, if it has several.
        skip_bad_rows: read every row with its images now, and leave out those that are invalid;
            `bad_rows` names them. Default: a bad row raises when it is asked for.

    Raises:
        TypeError: source is not a path.
        FileNotFoundError: the file does not exist.
        ValueError: the file cannot be read as a whole (see `mllama.data.files`), has no rows, or
            only bad ones; an option is not for this kind of source.
        ImportError: the datasets library is needed and not installed.
    """
    if not isinstance(source, (str, os.PathLike)) or not os.fspath(source):
        raise TypeError(f"data must be a path or the id of a data set, got {source!r}")
    path = Path(os.fsdecode(source))
    folder: Path | None = path if path.is_dir() else path.parent
    rows: Rows
    if path.is_dir() and not is_saved(path):
        if question is None:
            raise ValueError(f"question is needed for the images in the folders of {path}")
        if image_folder is not None:
            raise ValueError(f"image_folder must be None for a folder of images, {path}")
        rows = ClassFolders(path)
    elif path.is_dir():
        rows = HubRows(path, split)
    elif path.exists() or path.suffix.lower() in _FILES:
        rows = _open_file(path)
    elif isinstance(source, str) and _ID.fullmatch(source):
        rows, folder = HubRows(source, split), None
    else:
        raise FileNotFoundError(f"no such data: {path}")
    if split is not None and not isinstance(rows, HubRows):
        raise ValueError(f"split must be None: {path} has no splits, got {split!r}")
    examples = Examples(rows, ImageFinder(image_folder or folder), question)
    return examples.leave_out_bad(load_images) if skip_bad_rows else examples


def load_images(example: Example) -> None:
    """Load the images of an example.

    Raises:
        ValueError: one cannot be loaded; the message begins with the example's `where`.
    """
    for image in example.images:
        try:
            load_image(image)
        except (OSError, ValueError) as error:
            raise ValueError(f"{example.where}: {error}") from error


def _open_file(path: Path) -> Rows:
    suffix = path.suffix.lower()
    if suffix not in _FILES:
        raise ValueError(f"data must be a file with one of {', '.join(_FILES)}, got {path}")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is a pipe or a device, not a file")
    if suffix == ".csv":
        return CsvRows(path)
    return JsonArray(path) if suffix == ".json" and _is_array(path) else JsonLines(path)


def _is_array(path: Path) -> bool:
    with open(path, "rb") as file:
        return file.read(1024).removeprefix(BOM).lstrip()[:1] == b"["
