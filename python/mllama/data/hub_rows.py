"""Rows of the datasets library: an id on the hub, or a folder of `save_to_disk`."""

from pathlib import Path
from typing import Any

from mllama.data.files import Rows
from mllama.data.rows import COLUMNS, READ

_SAVED = ("dataset_dict.json", "state.json")


def is_saved(folder: Path) -> bool:
    """Whether a folder was written by `save_to_disk`."""
    return any((folder / name).is_file() for name in _SAVED)


class HubRows(Rows):
    """Rows of a data set, as they are stored: images stay encoded.

    Args:
        source: an id, or the folder of `save_to_disk`.
        split: which split, if there are several.

    Raises:
        ImportError: the datasets library is not installed.
        ValueError: the data set cannot be opened, the split is unknown or needed, or there are no
            columns that are read.
    """

    def __init__(self, source: str | Path, split: str | None):
        self.name = source.name if isinstance(source, Path) else source
        data = _one_split(_open(source, split), split, self.name)
        columns = [name for name in data.column_names if name in COLUMNS]
        self.unread = [name for name in data.column_names if name not in COLUMNS]
        if not set(columns) & set(READ):
            found = ", ".join(data.column_names)
            raise ValueError(f"{self.name} needs columns of {', '.join(READ)}, got {found}")
        # Arrow's own values: the library would decode images by its own rules.
        self._rows = data.select_columns(columns).with_format("arrow")
        if not len(self._rows):
            raise ValueError(f"{self.name} has no rows")

    def row(self, index: int) -> Any:
        return self._rows[index].to_pylist()[0]


def _open(source: str | Path, split: str | None) -> Any:
    try:
        import datasets  # type: ignore[import-untyped]
    except ImportError as error:
        raise ImportError(
            f'{source} needs the datasets library: pip install "mllama[train]"'
        ) from error
    try:
        if isinstance(source, Path):
            return datasets.load_from_disk(str(source))
        return datasets.load_dataset(source, split=split)  # other splits are not downloaded
    except Exception as error:  # of many types: files, formats, the network
        reason = " ".join(str(error).split())[:500]
        raise ValueError(f"cannot open the data set {source}: {reason}") from error


def _one_split(data: Any, split: str | None, name: str) -> Any:
    if not isinstance(data, dict):
        if split is not None and split != str(data.split):
            raise ValueError(f"split must be None: {name} has no splits, got {split!r}")
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split not in data:
        raise ValueError(f"split must be one of {', '.join(data)} of {name}, got {split!r}")
    return data[split]
