"""Runs of `mllama.train` that are stopped, killed and resumed, and what may go wrong."""

import errno
import functools
import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mllama.train import loop, random_state
from mllama.train.course import Course
from mllama.train.run import train
from mllama.train.settings import load_settings
from training.runs import (
    assert_same_run,
    assert_same_tensors,
    in_child,
    interrupt,
    log_of,
    replaced,
    settings_of,
    trained,
)

pytest.importorskip("accelerate")
KILLS = 20


@pytest.fixture
def settings(model_folder, data, tmp_path):
    return settings_of(model_folder, data, tmp_path / "run", log_every=2)


@pytest.fixture(scope="module")
def whole(model_folder, data, tmp_path_factory):
    """The folder of a run that is not interrupted."""
    output = tmp_path_factory.mktemp("whole") / "run"
    trained(settings_of(model_folder, data, output, log_every=2))
    return output


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 3, 4])
def test_stopped_and_resumed_equals_uninterrupted(settings, whole, monkeypatch, number, step):
    handlers = [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)]
    with monkeypatch.context() as patch:
        interrupt(patch, number, step)
        result = train(settings)
    assert (result.signal, result.step, result.trained) == (number, step, None)
    assert [signal.getsignal(one) for one in (signal.SIGTERM, signal.SIGINT)] == handlers
    torch.rand(3)  # another process would have other random numbers
    random.random()
    again = load_settings(result.output / "settings.yaml")  # as the command says
    assert again == settings
    trained(again, resume=True)
    assert_same_run(result.output, whole)


def test_a_run_with_float16_and_workers_resumes_too(settings, monkeypatch, tmp_path):
    settings = replaced(settings, dtype="float16", workers=1)
    trained(replaced(settings, output=str(tmp_path / "whole")))
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGTERM, 3)
        train(settings)
    trained(settings, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def steps_of(output: Path) -> int:
    """Steps of a run that have a checkpoint."""
    return len(list((output / "checkpoints").glob("step-*")))


def test_killed_at_random_moments_it_always_resumes(settings, tmp_path):
    settings = replaced(settings, max_steps=60, save_every=1, eval_every=20, keep=100)
    trained(replaced(settings, output=str(tmp_path / "whole")))
    draw, killed = random.Random(0), 0
    for _ in range(KILLS):
        goal = steps_of(tmp_path / "run") + draw.randint(0, 4)
        child = in_child(settings, resume=True)
        while steps_of(tmp_path / "run") < goal and os.waitpid(child, os.WNOHANG) == (0, 0):
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.05))  # about a step: any moment of it
        os.kill(child, signal.SIGKILL)
        killed += os.waitpid(child, 0)[1] == signal.SIGKILL
        for folder in (tmp_path / "run/checkpoints").glob("step-*"):  # each is whole
            names = ("weights", "optimizer", "random")
            assert all(load_file(folder / f"{name}.safetensors") for name in names)
    assert killed == KILLS and not (tmp_path / "error.txt").exists()
    assert steps_of(tmp_path / "run") < 60
    assert os.waitpid(in_child(settings, resume=True), 0)[1] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    assert not list((tmp_path / "run/checkpoints").glob(".*"))  # what was left is removed


def test_a_second_signal_ends_at_once(settings, tmp_path, monkeypatch):
    monkeypatch.setattr(loop.Loop, "_update", lambda self, step: time.sleep(60))
    child = in_child(settings)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run/settings.yaml").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    os.kill(child, signal.SIGINT)
    time.sleep(0.5)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)  # it would finish its step
    os.kill(child, signal.SIGINT)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGINT


def test_the_folder_of_another_run(settings, tmp_path, monkeypatch):
    trained(replaced(settings, max_steps=2))
    with pytest.raises(FileExistsError, match="--resume"):
        train(settings)
    with pytest.raises(ValueError, match=r"max_steps \(was 2\)"):
        train(settings, resume=True)
    with pytest.raises(ValueError, match="learning_rate.*rank|rank.*learning_rate"):
        train(replaced(settings, max_steps=2, rank=3, learning_rate=0.1), resume=True)
    again = trained(replaced(settings, max_steps=2, keep=1, log_every=1), resume=True)
    assert again.step == 2 and len(log_of(tmp_path / "run")) == 2


def test_a_folder_in_use(settings, tmp_path, monkeypatch):
    def second(self, step: int) -> None:
        with pytest.raises(OSError, match="in use"):
            train(settings, resume=True)
        raise KeyboardInterrupt

    monkeypatch.setattr(loop.Loop, "_update", second)
    with pytest.raises(KeyboardInterrupt):
        train(settings)


def test_other_rows_are_another_run(settings, tmp_path, data):
    copy = data.with_name("copy.jsonl")
    copy.write_text(data.read_text())
    settings = replaced(settings, data=str(copy), max_steps=2)
    trained(settings)
    copy.write_text("".join(copy.read_text().splitlines(keepends=True)[:5]))
    with pytest.raises(ValueError, match="rows"):
        train(settings, resume=True)


def test_a_full_disk_leaves_the_checkpoints_before(settings, tmp_path, monkeypatch):
    fsync = os.fsync

    def full(descriptor: int) -> None:
        if list((tmp_path / "run/checkpoints").glob("step-*")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            train(settings)
    assert [path.name for path in (tmp_path / "run/checkpoints").iterdir()] == ["step-00000002"]
    trained(settings, resume=True)


def test_a_loss_that_is_no_number_stops_the_run(settings, tmp_path, monkeypatch):
    forward = loop.Loop._forward

    def broken(self, batch, **options):
        output = forward(self, batch, **options)
        if self.state.step == 4 and options:
            output.loss = output.loss * torch.nan
        return output

    monkeypatch.setattr(loop.Loop, "_forward", broken)
    with pytest.raises(ValueError, match="step 5: the loss is nan.*step-00000004"):
        train(settings)
    folder = tmp_path / "run/checkpoints/step-00000004"
    assert all(one.isfinite().all() for one in load_file(folder / "weights.safetensors").values())
    assert [entry["step"] for entry in log_of(tmp_path / "run")] == [2, 3, 4]


def scale_by(monkeypatch, first: float, **options: float) -> None:
    """Begin float16 runs with a scale of the loss; with 2**40 gradients are not finite."""
    scaler = functools.partial(torch.amp.GradScaler, init_scale=first, **options)
    monkeypatch.setattr(torch.amp, "GradScaler", scaler)


def test_the_log_of_a_step_that_float16_skips_is_json(settings, monkeypatch):
    scale_by(monkeypatch, 2.0**40, backoff_factor=2.0**-30)
    settings = replaced(settings, dtype="float16", max_steps=2, log_every=1)
    lines = (trained(settings).output / "log.jsonl").read_text().splitlines()
    entries = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    skipped, made = (entry["grad_norm"] for entry in entries if "loss" in entry)
    assert skipped is None and made > 0


@pytest.mark.parametrize("stopped", [False, True])
def test_a_run_of_which_float16_skips_every_step(settings, tmp_path, monkeypatch, stopped):
    scale_by(monkeypatch, 2.0**40)
    settings = replaced(settings, dtype="float16", max_steps=2)
    if stopped:
        with monkeypatch.context() as patch:
            interrupt(patch, signal.SIGTERM, 1)
            assert train(settings).step == 1
    said = r"step 2: all 2 steps were skipped.* still 2.7\d*e\+11"  # 2**38
    with pytest.raises(ValueError, match=said):
        train(settings, resume=stopped)
    assert not (tmp_path / "run/adapter").exists()


def test_a_step_that_float16_made_before_a_stop_counts(settings, monkeypatch):
    scale_by(monkeypatch, 2.0**10, growth_interval=1, growth_factor=2.0**30)
    settings = replaced(settings, dtype="float16", max_steps=2, log_every=1)
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGTERM, 1)
        train(settings)
    result = trained(settings, resume=True)
    norms = [entry["grad_norm"] for entry in log_of(result.output) if "loss" in entry]
    assert norms[0] > 0 and norms[1] is None


def test_an_adapter_that_gets_no_gradient(settings, tmp_path, data):
    text = data.with_name("text.jsonl")
    lines = data.read_text().splitlines(keepends=True)
    text.write_text("".join(line for line in lines if "image" not in line))
    with pytest.raises(ValueError, match="no gradient has reached.*vision_tower"):
        train(replaced(settings, data=str(text), targets=("vision",)))


def _flip_a_bit(checkpoint: Path) -> None:
    path = checkpoint / "weights.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def _drop_the_optimizer(checkpoint: Path) -> None:
    save_file({}, checkpoint / "optimizer.safetensors")


def _edit_the_state(checkpoint: Path) -> None:
    path = checkpoint / "state.json"
    path.write_text(path.read_text().replace('"processes": 1', '"processes": 2'))


def _take_another(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint)
    shutil.copytree(checkpoint.with_name("step-00000004"), checkpoint)


@pytest.mark.parametrize(
    "harm", [_flip_a_bit, _drop_the_optimizer, _edit_the_state, _take_another, shutil.rmtree]
)
def test_a_broken_checkpoint_is_named(settings, tmp_path, whole, harm):
    output = shutil.copytree(whole, tmp_path / "run")
    checkpoint = output / "checkpoints/step-00000006"
    harm(checkpoint)
    checkpoint.mkdir(exist_ok=True)
    with pytest.raises(ValueError, match="step-00000006 is broken"):
        train(settings, resume=True)


def test_a_best_checkpoint_that_is_gone(settings, tmp_path, monkeypatch, capsys):
    """The run ends with what there is, and not with an error after all of its steps."""
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGTERM, 5)
        assert train(settings).best_step == 3
    shutil.rmtree(tmp_path / "run/checkpoints/step-00000003")
    monkeypatch.setattr(loop.Loop, "_evaluate", lambda self, step: False)
    assert trained(settings, resume=True).best_step is None
    assert "step 3, is gone" in capsys.readouterr().err


def test_gradients_before_the_stop_count(settings, monkeypatch, tmp_path, data):
    lines = data.read_text().splitlines(keepends=True)
    rows = tmp_path / "rows.jsonl"
    settings = replaced(settings, data=str(rows), eval_fraction=0.0, eval_every=None)
    settings = replaced(settings, image_folder=str(data.parent), targets=("vision", "attn"))
    settings = replaced(settings, batch_size=1, max_steps=2)
    order = [row for step in (1, 2) for part in Course(settings, 4).batches(step) for row in part]
    kinds = dict(zip(order, (lines[0], lines[2], lines[1], lines[3]), strict=True))
    rows.write_text("".join(kinds[row] for row in range(4)))  # images in the first step alone
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGTERM, 1)
        train(settings)
    assert trained(settings, resume=True).step == 2


def test_a_run_without_a_checkpoint_begins_again(settings, tmp_path, data):
    """As the error says: with skip_bad_rows."""
    rows = data.with_name("one_bad.jsonl")
    rows.write_text(data.read_text() + '{"question": "What?", "answer": ""}\n')
    settings = replaced(settings, data=str(rows), batch_size=6, eval_fraction=0.0, eval_every=None)
    with pytest.raises(ValueError, match="row 11"):
        train(settings)
    result = trained(replaced(settings, skip_bad_rows=True, max_steps=1), resume=True)
    assert result.step == 1 and len(result.bad_rows) == 1


def test_random_numbers_go_on():
    import numpy as np

    random.gauss(0, 1)
    np.random.normal()
    states = random_state.capture()
    first = random.gauss(0, 1), np.random.normal(), torch.rand(3), random.random()
    random_state.restore(states)
    second = random.gauss(0, 1), np.random.normal(), torch.rand(3), random.random()
    assert str(first) == str(second)


def test_two_runs_have_the_same_bits(settings, whole, tmp_path):
    trained(settings)
    adapters = "adapter/adapter_model.safetensors"
    assert_same_tensors(tmp_path / "run" / adapters, whole / adapters)
