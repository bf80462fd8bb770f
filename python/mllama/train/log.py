"""The log of a run: log.jsonl, one JSON object per line."""

import json
import os
from pathlib import Path
from typing import Any

from mllama.checkpoints.files import write_file

NAME = "log.jsonl"


class Log:
    """Appends to the log, and keeps its entries in memory for the curves.

    Args:
        path: the file; created with the first entry.
        until: entries of later steps are removed, which a run that ended without a checkpoint of
            them has written.

    Attributes:
        entries: all entries, in order.
    """

    def __init__(self, path: Path, until: int = 0):
        self.path = path
        found = _read(path)
        self.entries = [entry for entry in found if entry["step"] <= until]
        if path.exists():
            text = "".join(_line(entry) for entry in self.entries)
            write_file(path, lambda aside: aside.write_text(text))

    def add(self, entry: dict[str, Any]) -> None:
        """Append an entry, which has a `step`."""
        self.entries.append(entry)
        with self.path.open("a") as file:
            file.write(_line(entry))

    def sync(self) -> None:
        """Flush the log to disk, before a checkpoint that follows it."""
        if self.path.exists():
            with self.path.open("rb") as file:
                os.fsync(file.fileno())

    def values(self, name: str) -> tuple[list[int], list[float]]:
        """The steps whose entries have a value, and the values."""
        found = [(entry["step"], entry[name]) for entry in self.entries if name in entry]
        return [step for step, _ in found], [value for _, value in found]


def _line(entry: dict[str, Any]) -> str:
    return json.dumps(entry, allow_nan=False) + "\n"


def _read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file, up to a line that was not written whole."""
    entries: list[dict[str, Any]] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            entry = json.loads(line, parse_constant=lambda name: None)  # of older logs
        except ValueError:
            break
        if not isinstance(entry, dict) or not isinstance(entry.get("step"), int):
            break
        entries.append(entry)
    return entries
