"""`mllama train` with two processes on the CPU, by torchrun and accelerate, and forked."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import distributed

import mllama
from mllama.train.course import Course
from training.runs import (
    assert_same_run,
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
LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node=2"],
    "accelerate": [
        "accelerate.commands.launch",
        *("--multi_gpu", "--num_processes=2", "--num_machines=1", "--mixed_precision=no"),
        *("--dynamo_backend=no", "--main_process_port=0"),
    ],
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    if not distributed.is_gloo_available():
        pytest.skip("this torch has no gloo")
    return write_rows(tmp_path_factory.mktemp("data"))


def launch(launcher: str, settings, *flags: str) -> subprocess.CompletedProcess:
    """A run of two processes."""
    values = dataclasses.asdict(settings).items()
    config = {name: list(value) if isinstance(value, tuple) else value for name, value in values}
    path = f"{settings.output}.yaml"
    with open(path, "w") as file:
        yaml.safe_dump(config, file)
    command = [sys.executable, "-m", *LAUNCHERS[launcher], "-m", "mllama", "train", path, *flags]
    return subprocess.run(
        command, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_learn_what_one_does_of_all_rows(launcher, model_folder, data, tmp_path):
    settings = settings_of(
        model_folder,
        data,
        tmp_path / "two",
        dropout=0.0,
        accumulation=1,
        samples=1,
        targets=("attn", "projector"),  # without gradients in rows without images
    )
    done = launch(launcher, settings)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("trained tokens") == 1  # the first process alone prints
    trained(replaced(settings, output=str(tmp_path / "one"), accumulation=2))
    pairs = zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True)
    for two, one in pairs:
        assert two == pytest.approx(one, rel=1e-3)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_weights_shared_out_learn_the_same(forking, method, model_folder, tmp_path):
    options = {"dropout": 0.0}
    if method == "full":
        options |= {"rank": 16, "method": "full", "learning_rate": 1e-3, "checkpoint": "sharded"}
    images = write_rows(tmp_path, text=False)
    settings = settings_of(model_folder, images, tmp_path / "two", samples=1, shard=True, **options)
    trained_by_two(settings)
    one = {"output": str(tmp_path / "one"), "accumulation": 4, "shard": False}
    one = replaced(settings, **one, checkpoint="gathered")
    result = trained(one)
    for two, alone in zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True):
        assert two == pytest.approx(alone, rel=1e-3)
    kind = {"lora": {"adapter": tmp_path / "two/adapter"}, "full": {}}[method]
    folder = model_folder if method == "lora" else tmp_path / "two/model"
    model, _ = mllama.load(folder, "float32", "cpu", **kind)
    best = f"checkpoints/step-{result.best_step:08}/weights.safetensors"
    saved = load_file(result.output / best)
    for name, parameter in model.named_parameters():
        if name in saved:
            torch.testing.assert_close(parameter.detach(), saved[name], rtol=1e-2, atol=1e-3)


def test_weights_shared_out_need_the_same_layers(forking, model_folder, data, tmp_path):
    settings = settings_of(model_folder, data, tmp_path / "two", shard=True, batch_size=1)
    assert all(waited(start_two(settings)))
    assert "need rows with images, or none does" in (tmp_path / "error.txt").read_text()
    with pytest.raises(ValueError, match="several processes"):
        trained(settings)


def test_a_process_without_images_and_an_adapted_encoder(forking, model_folder, data, tmp_path):
    """It has no gradient of its own; in the last step no process has one."""
    settings = settings_of(model_folder, data, tmp_path / "two", batch_size=1, accumulation=1)
    changes = {"dropout": 0.0, "eval_fraction": 0.0, "eval_every": None, "targets": ("vision",)}
    settings = replaced(settings, **changes, max_steps=3, data=str(tmp_path / "rows.jsonl"))
    settings = replaced(settings, image_folder=str(data.parent), weight_decay=0.1)
    course = Course(settings, 6, processes=2)
    order = [row for step in (1, 2, 3) for rank in (0, 1) for row in course.batches(step, rank)[0]]
    image, text = data.read_text().splitlines()[:2]
    kinds = dict(zip(order, (image, text, image, text, text, text), strict=True))
    (tmp_path / "rows.jsonl").write_text("\n".join(kinds[row] for row in range(6)))
    trained_by_two(settings)
    result = trained(replaced(settings, output=str(tmp_path / "one"), accumulation=2))
    pairs = zip(log_of(tmp_path / "two"), log_of(tmp_path / "one"), strict=True)
    for two, one in pairs:
        assert two == pytest.approx(one, rel=1e-3)
    two, one = (tmp_path / name / "adapter/adapter_model.safetensors" for name in ("two", "one"))
    saved = load_file(one)
    for name, tensor in load_file(two).items():
        torch.testing.assert_close(tensor, saved[name], rtol=1e-2, atol=1e-4)
    assert result.step == 3 and log_of(tmp_path / "two")[-1]["grad_norm"] == 0


def test_two_processes_resume(forking, model_folder, data, tmp_path):
    settings = settings_of(model_folder, data, tmp_path / "whole", accumulation=1)
    parts = replaced(settings, output=str(tmp_path / "parts"))
    trained_by_two(settings)
    trained_by_two(parts)
    for step in (5, 6):  # as if it had ended after step 4
        folder = tmp_path / f"parts/checkpoints/step-{step:08}"
        if folder.exists():
            folder.rename(tmp_path / f"removed-{step}")
    trained_by_two(parts, resume=True)
    assert_same_run(tmp_path / "parts", tmp_path / "whole")
    with pytest.raises(ValueError, match="2 processes, this one 1"):
        trained(parts, resume=True)
