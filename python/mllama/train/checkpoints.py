"""Checkpoints of a run: safetensors and JSON, written aside, flushed and renamed.

The first process writes whole tensors, or every process its own part (`checkpoint: sharded`); then
there are folders in place of the files weights.safetensors and optimizer.safetensors.
"""

import re
import shutil
import uuid
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import distributed

from mllama.checkpoints.files import listing, read_json, save_tensors, write_folder, write_json
from mllama.train.shards import read_shards, write_shards

_SHARDED = ("weights", "optimizer")
_TENSORS = (*_SHARDED, "random")
_NAME = re.compile(r"step-(\d{8})")
_ASIDE = re.compile(r"\.(step-\d{8}|removed|shards)-[0-9a-f]{32}")  # what a killed process leaves
_SUMS = "checksums.json"
_BLOCK = 2**24  # bytes


@dataclass
class Checkpoint:
    """All that a run needs to go on.

    Attributes:
        step: the last step that was made.
        weights: trained parameters by name.
        optimizer: tensors of the optimizer's state.
        random: states of the random number generators, [processes, ...] each.
        plain: everything else, as JSON holds it.
    """

    step: int
    weights: Mapping[str, torch.Tensor]
    optimizer: Mapping[str, torch.Tensor]
    random: Mapping[str, torch.Tensor]
    plain: dict[str, Any] = field(default_factory=dict)


class CheckpointFolder:
    """The checkpoints of a run.

    Args:
        folder: where they are; created with the first one.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def steps(self) -> list[int]:
        """The steps that have a checkpoint, in order. Each is whole: names appear by a rename."""
        if not self.folder.is_dir():
            return []
        found = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(match[1]) for match in found if match)

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / f"step-{step:08}"

    def stage(
        self, step: int, weights: Mapping[str, torch.Tensor], optimizer: Mapping[str, torch.Tensor]
    ) -> Path:
        """Write the parts of a checkpoint's tensors aside; every process calls this with its own.

        Returns:
            A folder that `save` makes part of the checkpoint.

        Raises:
            OSError: as `save`, in all processes.
        """
        names = [f".shards-{uuid.uuid4().hex}"]
        distributed.broadcast_object_list(names)
        staged = self.folder / names[0]
        with self._told(step):
            write_shards(staged / "weights", weights)
            write_shards(staged / "optimizer", optimizer)
        return staged

    def save(self, checkpoint: Checkpoint, staged: Path | None = None) -> None:
        """Write a checkpoint, all of it or none.

        Args:
            checkpoint: what to write.
            staged: of `stage`: replaces its weights and optimizer.

        Raises:
            OSError: it cannot be written; earlier ones are as they were.
        """

        def write(aside: Path) -> None:
            for name in _TENSORS:
                if staged is not None and name in _SHARDED:
                    (staged / name).rename(aside / name)
                    continue
                save_tensors(aside / f"{name}.safetensors", _stored(getattr(checkpoint, name)))
            write_json(aside / "state.json", {"step": checkpoint.step, **checkpoint.plain})
            sums = {str(file.relative_to(aside)): _checksum(file) for file in _summed(aside)}
            write_json(aside / _SUMS, sums)

        path = self.path(checkpoint.step)
        if not path.exists():  # else it was resumed with nothing left to do
            with self._told(checkpoint.step):
                write_folder(path, write)
        if staged is not None:
            shutil.rmtree(staged, ignore_errors=True)

    @contextmanager
    def _told(self, step: int) -> Iterator[None]:
        """Say in the error of a checkpoint that cannot be written which the last one is."""
        try:
            yield
        except Exception as error:  # safetensors has an exception of its own for a full disk
            kept = self.steps()
            last = f"the last whole one is {self.path(kept[-1])}" if kept else "there is none yet"
            raise OSError(
                f"the checkpoint of step {step} cannot be written: {error}; {last}"
            ) from error

    def load(self, step: int, like: Mapping[str, torch.Tensor]) -> Checkpoint:
        """Read a checkpoint, onto the CPU; one of parts as `like`, and every process calls this.

        Args:
            step: its step.
            like: the trained parameters by name, for the devices and shards of parts.

        Raises:
            ValueError: it is broken: a file is missing, or not as it was written.
        """
        path = self.path(step)
        try:
            checksums = read_json(path / _SUMS)
            for file in _summed(path):
                name = str(file.relative_to(path))
                if checksums.pop(name, None) != _checksum(file):
                    raise ValueError(f"{name} was changed")
            if checksums:
                raise ValueError(f"{listing(list(checksums))} is missing")
            parts = {
                name: read_shards(path / name, like)
                if (path / name).is_dir()
                else load_file(path / f"{name}.safetensors")
                for name in _TENSORS
            }
            plain = read_json(path / "state.json")
            if plain["step"] != step:
                raise ValueError(f"it is of step {plain['step']}")
            return Checkpoint(plain.pop("step"), **parts, plain=plain)
        except Exception as error:  # safetensors has an exception of its own
            raise ValueError(
                f"the checkpoint {path} is broken ({error}): remove it to resume earlier"
            ) from error

    def prune(self, keep: int, best: int | None) -> None:
        """Remove all but the last `keep` and the one of step `best`."""
        for step in self.steps()[:-keep]:
            if step != best:
                self._remove(step)

    def _remove(self, step: int) -> None:
        aside = self.folder / f".removed-{uuid.uuid4().hex}"
        self.path(step).rename(aside)  # no half of it is ever found under its name
        shutil.rmtree(aside, ignore_errors=True)

    def sweep(self) -> None:
        """Remove what a killed process left."""
        if self.folder.is_dir():
            for path in self.folder.iterdir():
                if _ASIDE.fullmatch(path.name):
                    shutil.rmtree(path, ignore_errors=True)


def _summed(folder: Path) -> list[Path]:
    """The files of a checkpoint that have checksums. Parts are too many bytes for every process to
    read: what has a checksum is the index with their sizes.
    """
    own = [path for path in folder.iterdir() if path.is_file() and path.name != _SUMS]
    return sorted([*own, *folder.glob("*/*.json")])


def _checksum(path: Path) -> int:
    """CRC-32: against accidents, not against forgers."""
    checksum = 0
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            checksum = zlib.crc32(block, checksum)
    return checksum


def _stored(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
