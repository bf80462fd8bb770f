"""Checkpoints that two processes write, each its own part: `shard: true`, `checkpoint: sharded`.
The processes are forked, which is quicker than torchrun.
"""

import errno
import json
import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from mllama.train.settings import TrainSettings
from training.runs import (
    assert_same_run,
    assert_same_tensors,
    log_of,
    replaced,
    settings_of,
    start_two,
    trained,
    trained_by_two,
    waited,
    write_rows,
)

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("forking")
STEP = "step-{:08}"


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Rows with images alone."""
    return write_rows(tmp_path_factory.mktemp("data"), text=False)


def sharded(model: Path, data: Path, output: Path) -> TrainSettings:
    return settings_of(
        model,
        data,
        output,
        shard=True,
        checkpoint="sharded",
        accumulation=1,
        targets=("attn",),
        rank=3,  # two processes have unequal parts
        eval_fraction=0.0,
        eval_every=None,
        save_every=1,
        keep=10,
    )


@pytest.fixture
def settings(model_folder, images, tmp_path):
    return sharded(model_folder, images, tmp_path / "run")


@pytest.fixture(scope="module")
def whole(model_folder, images, tmp_path_factory):
    """The folder of a run that is not interrupted, whose checkpoints are gathered."""
    output = tmp_path_factory.mktemp("whole") / "run"
    trained_by_two(replaced(sharded(model_folder, images, output), checkpoint="gathered"))
    return output


def parts_of(folder: Path) -> dict[str, list[torch.Tensor]]:
    """The parts of each tensor of a folder, whose files are checked against its index. Of what is
    no tensor's part, such as a number of steps, either process writes one.
    """
    index = json.loads((folder / "index.json").read_text())
    assert index["processes"] == 2 and len(index["files"]) == 2
    assert {path.name for path in folder.iterdir()} == {"index.json", *index["files"]}
    found: dict[str, list[torch.Tensor]] = {}
    for name, size in sorted(index["files"].items()):
        assert (folder / name).stat().st_size == size
        with safe_open(folder / name, "pt") as file:
            for key in file.keys():  # noqa: SIM118
                found.setdefault(key, []).append(file.get_tensor(key))
    return found


def assert_parts_of(one: Path, whole: Path) -> None:
    """A checkpoint in parts has the bits of one of whole tensors."""
    for name in ("weights", "optimizer"):
        parts, tensors = parts_of(one / name), load_file(whole / f"{name}.safetensors")
        assert parts.keys() == tensors.keys()
        for key, tensor in tensors.items():
            found = torch.cat(parts[key]) if tensor.ndim else parts[key][0]
            assert torch.equal(found, tensor)
            assert not tensor.ndim or 0 < len(parts[key][0]) < len(tensor)
    assert_same_tensors(one / "random.safetensors", whole / "random.safetensors")
    states = [json.loads((folder / "state.json").read_text()) for folder in (one, whole)]
    assert states[0] == states[1]


def test_each_process_writes_its_part(settings, whole, tmp_path):
    trained_by_two(settings)
    steps = tmp_path / "run/checkpoints"
    assert_parts_of(steps / STEP.format(6), whole / "checkpoints" / STEP.format(6))
    suffixes = {path.suffix for path in steps.rglob("*") if path.is_file()}
    assert suffixes == {".safetensors", ".json"}
    for step in (5, 6):
        (steps / STEP.format(step)).rename(tmp_path / str(step))
    # The rest from parts, with checkpoints of the other kind.
    trained_by_two(replaced(settings, checkpoint="gathered"), resume=True)
    assert_same_run(tmp_path / "run", whole)


def at_fsync(monkeypatch, act: Callable[[str], None]) -> None:
    """Call act(path) when a process is about to flush a file or folder."""
    fsync = os.fsync

    def first(descriptor: int) -> None:
        act(os.readlink(f"/proc/self/fd/{descriptor}"))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", first)


def test_killed_while_it_writes_it_resumes(settings, whole, monkeypatch, tmp_path):
    steps = tmp_path / "run/checkpoints"
    for step, place, killed in (
        (2, r"/\.shards-\w*/optimizer/shard-00002", 1),
        (3, r"/\.step-00000003-\w*$", 0),  # all is written, and about to be renamed
    ):

        def kill(path: str, step=step, place=place) -> None:
            if re.search(place, path) and (steps / STEP.format(step - 1)).exists():
                os.kill(os.getpid(), signal.SIGKILL)

        with monkeypatch.context() as patch:
            at_fsync(patch, kill)
            children = start_two(settings, resume=True)
        assert os.waitpid(children[killed], 0)[1] == signal.SIGKILL
        os.kill(children[1 - killed], signal.SIGKILL)
        os.waitpid(children[1 - killed], 0)
        assert list(steps.glob(".*"))
        kept = sorted(path.name for path in steps.glob("step-*"))
        assert kept == [STEP.format(each) for each in range(1, step)]
    assert_parts_of(steps / STEP.format(2), whole / "checkpoints" / STEP.format(2))
    trained_by_two(settings, resume=True)
    assert_parts_of(steps / STEP.format(6), whole / "checkpoints" / STEP.format(6))
    assert log_of(tmp_path / "run") == log_of(whole)
    assert not list(steps.glob(".*"))  # what was left is removed


def test_a_full_disk_and_broken_parts(settings, tmp_path, monkeypatch):
    """What one process cannot do ends both."""
    steps, said = tmp_path / "run/checkpoints", tmp_path / "error.txt"

    def full(path: str) -> None:
        if "shard-00002" in path and list(steps.glob("step-*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        at_fsync(patch, full)
        ended = waited(start_two(settings))
    assert all(ended) and "No space left" in said.read_text() and STEP.format(1) in said.read_text()
    assert [path.name for path in steps.glob("step-*")] == [STEP.format(1)]
    (broken,) = (steps / STEP.format(1) / "optimizer").glob("shard-00002*")
    broken.write_bytes(broken.read_bytes()[:-8])
    ended = waited(start_two(settings, resume=True))
    assert all(ended) and "step-00000001 is broken" in said.read_text()
    assert broken.name in said.read_text()


def test_it_is_for_shared_weights(settings):
    with pytest.raises(ValueError, match="checkpoint: sharded needs shard"):
        replaced(settings, shard=False)
    with pytest.raises(ValueError, match="several processes"):
        trained(settings)
