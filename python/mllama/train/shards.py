"""Tensors of several processes in one folder: each process writes its own part, by torch's writer
of safetensors (`torch.distributed.checkpoint`), and the first one an index of the files.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import distributed

from mllama.checkpoints.files import read_json, write_file, write_json

_INDEX = "index.json"


def write_shards(folder: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors and flush them to disk. Every process calls this, with its parts of sharded
    tensors; of others, which all processes have, one writes each.

    Args:
        folder: created if needed; seen by all processes.
        tensors: by name, the same names in every process.

    Raises:
        OSError: a process cannot write; then all of them raise.
    """
    from torch.distributed import checkpoint  # slow to import

    writer = checkpoint.HuggingFaceStorageWriter(str(folder), save_distributed=True)
    own = {name: tensor.detach() for name, tensor in tensors.items()}
    _together(lambda: checkpoint.save(own, storage_writer=writer))
    if distributed.get_rank() == 0:
        sizes = {path.name: path.stat().st_size for path in folder.glob("*.safetensors")}
        index = {"processes": distributed.get_world_size(), "files": sizes}
        write_file(folder / _INDEX, lambda aside: write_json(aside, index))


def read_shards(folder: Path, like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Read what `write_shards` wrote, in any number of processes. Every process calls this.

    Args:
        folder: of `write_shards`.
        like: tensors by name. One in the folder that has the name and shape of one of these, or its
            shape and a name below its own ("NAME.exp_avg"), is sharded like it; others are whole.

    Raises:
        ValueError: a file is missing or has another size than when it was written.
        OSError: a process cannot read.
    """
    from torch.distributed import checkpoint  # slow to import

    _check_files(folder)
    reader = checkpoint.HuggingFaceStorageReader(str(folder))
    found = {}
    for name, stored in reader.read_metadata().state_dict_metadata.items():
        shape, dtype = stored.size, stored.properties.dtype  # type: ignore[union-attr]
        near = like.get(name, like.get(name.rpartition(".")[0]))
        if near is not None and near.shape == shape:
            found[name] = torch.zeros_like(near.detach(), dtype=dtype)
        else:
            found[name] = torch.zeros(shape, dtype=dtype)
    _together(lambda: checkpoint.load(found, storage_reader=reader))
    return found


def _check_files(folder: Path) -> None:
    for name, size in read_json(folder / _INDEX)["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size:
            raise ValueError(f"{path} is missing or has another size")


def _together(work: Callable[[], Any]) -> None:
    """Do what all processes do, and raise in each what one of them raised."""
    from torch.distributed.checkpoint.api import CheckpointException  # no Exception

    try:
        work()
    except CheckpointException as error:
        process, (first, _) = next(iter(error.failures.items()))
        raise OSError(f"in process {process}: {first}") from error
