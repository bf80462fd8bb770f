"""A tiny model, a few rows and short runs of `mllama.train` on them."""

import dataclasses
import json
import os
import socket
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file

from mllama.train import loop
from mllama.train.run import TrainResult, train
from mllama.train.settings import TrainSettings

COLORS = ("red", "green", "blue", "white", "black")
TIMES = ("tokens_per_second", "peak_memory")  # of a log: what differs between equal runs


def write_rows(folder: Path, text: bool = True) -> Path:
    """Ten rows of unequal length, half of them with an image; or these alone."""
    rows = []
    for number, color in enumerate(COLORS):
        Image.new("RGB", (40, 30), color).save(folder / f"{color}.png")
        rows.append({"image": f"{color}.png", "question": "What color?", "answer": color})
        rows.append({"question": f"Say {number}.", "answer": f"It is {color}. " * (number + 1)})
    path = folder / "rows.jsonl"
    kept = [row for row in rows if text or "image" in row]
    path.write_text("".join(json.dumps(row) + "\n" for row in kept))
    return path


def settings_of(model: Path, data: Path, output: Path, **changes) -> TrainSettings:
    """Six steps of four rows, with dropout and evaluations."""
    given = {
        "model": str(model),
        "data": str(data),
        "output": str(output),
        "eval_fraction": 0.2,
        "max_steps": 6,
        "batch_size": 2,
        "accumulation": 2,
        "learning_rate": 1e-2,
        "rank": 2,
        "dropout": 0.2,
        "samples": 0,
        "eval_every": 3,
        "save_every": 2,
        "dtype": "float32",
        "device": "cpu",
    }
    return TrainSettings(**given | changes)


def in_child(settings: TrainSettings, resume: bool = False) -> int:
    """Start a run in a forked process that ends with it; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        torch.set_num_threads(1)
        quiet = os.open(os.devnull, os.O_WRONLY)
        os.dup2(quiet, 2)
        result = train(settings, resume)
        os._exit(0 if result.signal is None else 128 + result.signal)
    except BaseException as error:
        (Path(settings.output).parent / "error.txt").write_text(repr(error))
        os._exit(1)


def interrupt(monkeypatch, number: int, step: int) -> None:
    """Send this process a signal while it makes a step."""
    update = loop.Loop._update

    def interrupted(self, at: int) -> None:
        if at == step:
            os.kill(os.getpid(), number)
        update(self, at)

    monkeypatch.setattr(loop.Loop, "_update", interrupted)


def log_of(output: Path) -> list[dict]:
    """A run's log, without times."""
    entries = map(json.loads, (output / "log.jsonl").read_text().splitlines())
    return [{name: entry[name] for name in entry if name not in TIMES} for entry in entries]


def assert_same_run(one: Path, other: Path) -> None:
    """Two runs ended with the same bits: weights, optimizer, random numbers, adapter and log."""
    assert log_of(one) == log_of(other)
    last = [sorted((run / "checkpoints").iterdir())[-1] for run in (one, other)]
    assert last[0].name == last[1].name
    for name in ("weights", "optimizer", "random"):
        assert_same_tensors(*(folder / f"{name}.safetensors" for folder in last))
    states = [json.loads((folder / "state.json").read_text()) for folder in last]
    assert states[0] == states[1]
    assert_same_tensors(*(run / "adapter/adapter_model.safetensors" for run in (one, other)))


def assert_same_tensors(one: Path, other: Path) -> None:
    """Two safetensors files have the same bits."""
    first, second = load_file(one), load_file(other)
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)


def replaced(settings: TrainSettings, **changes) -> TrainSettings:
    """Other settings."""
    return dataclasses.replace(settings, **changes)


def trained(settings: TrainSettings, resume: bool = False) -> TrainResult:
    """A run that must end by itself."""
    result = train(settings, resume)
    assert result.signal is None and result.step == result.steps
    return result


def start_two(settings: TrainSettings, resume: bool = False) -> list[int]:
    """Start a run of two processes, forked, which is quicker than torchrun; returns their ids."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)  # this process's own, of earlier runs
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port = one.getsockname()[1]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    before, children = dict(os.environ), []
    try:
        for rank in ("0", "1"):
            os.environ.update(place, RANK=rank, LOCAL_RANK=rank, LOCAL_WORLD_SIZE="2")
            children.append(in_child(settings, resume))
    finally:
        os.environ.clear()
        os.environ.update(before)
    return children


def trained_by_two(settings: TrainSettings, resume: bool = False) -> None:
    """A run of two processes that must end by itself."""
    ended = waited(start_two(settings, resume))
    said = Path(settings.output).parent / "error.txt"
    assert ended == [0, 0], said.read_text() if said.exists() else ended


def waited(children: list[int]) -> list[int]:
    """How processes ended; 0 is well."""
    return [os.waitpid(child, 0)[1] for child in children]
