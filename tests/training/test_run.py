"""Runs of `mllama.train`: what they compute, and what they write."""

import dataclasses
import json
import math
import runpy
import weakref
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mllama
from mllama.train.course import Course, held_out
from mllama.train.loop import Loop
from mllama.train.prepare import prepare_model
from mllama.train.run import train
from mllama.train.settings import TrainSettings
from training.runs import log_of, replaced, settings_of, trained

pytest.importorskip("accelerate")
peft = pytest.importorskip("peft")


@pytest.fixture(scope="module")
def finished(model_folder, data, tmp_path_factory):
    """The folder of a run, and its result."""
    output = tmp_path_factory.mktemp("finished") / "run"
    settings = settings_of(model_folder, data, output, samples=2, trackers=["tensorboard"])
    return output, trained(settings)


def test_a_run_learns_and_says_what_it_did(finished):
    output, result = finished
    entries = log_of(output)
    losses = [entry["loss"] for entry in entries if "loss" in entry]
    evaluations = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
    assert len(losses) == 6 and losses[-1] < losses[0] - 1
    assert result.loss == losses[-1] and result.trained_tokens == entries[-2]["trained_tokens"]
    assert result.best_loss == min(evaluations) and result.best_step == 6
    assert {path.name for path in (output / "checkpoints").iterdir()} == {
        "step-00000004",
        "step-00000006",
    }


def test_curves_samples_and_tracker(finished):
    from PIL import Image
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output, _ = finished
    for name in ("curves.png", "samples/step-00000003.png", "samples/step-00000006.png"):
        with Image.open(output / name) as image:
            assert len(image.convert("L").getcolors()) > 10  # not blank
    events = EventAccumulator(str(output / "trackers/run"))
    events.Reload()
    read = {one.step: one.value for one in events.Scalars("loss")}
    assert read == pytest.approx(
        {one["step"]: one["loss"] for one in log_of(output) if "loss" in one}
    )


def test_trackers_get_the_runs_name_and_folder(settings, monkeypatch):
    """accelerate's own name is the project's for most."""
    from accelerate import Accelerator

    given = []
    monkeypatch.setattr(Accelerator, "init_trackers", lambda self, *args: given.append(args))
    settings = replaced(settings, trackers=("tensorboard",), run_name="try", max_steps=1)
    result = trained(replaced(settings, eval_every=1, save_every=1))
    ((project, config, own),) = given
    assert project == own["wandb"]["name"] == own["trackio"]["name"] == "try"
    assert config["rank"] == 2
    # wandb writes to another folder if this one is not there
    assert (
        own["wandb"]["dir"] == str(result.output / "trackers")
        and (result.output / "trackers").is_dir()
    )


def test_no_file_of_a_run_is_a_pickle(finished):
    output, _ = finished
    files = [path for path in output.rglob("*") if path.is_file()]
    kinds = {path.suffix for path in files if "tfevents" not in path.name}
    assert kinds <= {".safetensors", ".json", ".jsonl", ".yaml", ".yml", ".png", ""}


def test_the_adapter_loads_in_mllama_and_in_peft_on_stock_transformers(finished, model_folder):
    from transformers import AutoModelForImageTextToText

    output, _ = finished
    ours, processor = mllama.load(model_folder, "float32", "cpu", adapter=output / "adapter")
    stock = AutoModelForImageTextToText.from_pretrained(model_folder).eval()
    theirs = peft.PeftModel.from_pretrained(stock, output / "adapter").eval()
    ids = torch.tensor([processor.tokenizer("Say 3. It is white")["input_ids"]])
    with torch.no_grad():
        logits = ours(input_ids=ids).logits
        torch.testing.assert_close(logits, theirs(input_ids=ids).logits, rtol=1e-4, atol=1e-4)
        with theirs.disable_adapter():
            assert not torch.allclose(logits, theirs(input_ids=ids).logits, atol=1e-2)


def test_accumulation_equals_one_large_batch(settings, tmp_path):
    """Rows of unequal length: a mean of means would weight their tokens differently."""
    settings = replaced(settings, dropout=0.0, max_steps=3)
    whole = replaced(settings, batch_size=4, accumulation=1, output=str(tmp_path / "whole"))
    parts = replaced(settings, batch_size=1, accumulation=4, output=str(tmp_path / "parts"))
    trained(whole)
    trained(parts)
    for one, other in zip(log_of(tmp_path / "whole"), log_of(tmp_path / "parts"), strict=True):
        assert one == pytest.approx(other, rel=1e-4)


def test_a_pass_ends_with_its_graph(settings, monkeypatch):
    """It holds the inputs of checkpointed layers, which the next pass would add its own to."""
    forward, before = Loop._forward, []

    def watched(self, batch, **options):
        assert not [one for one in before if one() is not None]
        output = forward(self, batch, **options)
        before.append(weakref.ref(output.loss))
        return output

    monkeypatch.setattr(Loop, "_forward", watched)
    settings = replaced(settings, eval_fraction=0.0, eval_every=None, accumulation=3, max_steps=1)
    trained(settings)
    assert len(before) == 3


def test_a_step_is_adamw_on_the_mean_over_all_labels(settings):
    """The first steps by hand, through logits."""
    settings = replaced(settings, dropout=0.0, max_steps=2, weight_decay=0.1, max_grad_norm=0.5)
    result = trained(settings)
    model, processor, _ = prepare_model(settings)
    from mllama.data.collate import Collator
    from mllama.data.sources import open_examples

    examples, collate = open_examples(settings.data), Collator(model, processor)
    kept, _ = held_out(len(examples), settings.eval_fraction, settings.seed)
    course = Course(settings, len(kept))
    parameters = [one for one in model.parameters() if one.requires_grad]
    optimizer = torch.optim.AdamW(parameters, weight_decay=0.1)
    model.train()
    for step in (1, 2):
        rows = [kept[row] for part in course.batches(step) for row in part]
        batch = collate([examples[row] for row in rows])
        labels = batch.pop("labels")
        logits = model(**batch).logits
        loss = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        )
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.param_groups[0]["lr"] = course.learning_rate(step)
        optimizer.step()
        optimizer.zero_grad()
    assert result.loss == pytest.approx(loss.item(), rel=1e-4)
    saved = load_file(result.output / "checkpoints/step-00000002/weights.safetensors")
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(saved[name], parameter.detach(), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"gradient_checkpointing": True},
        {"workers": 2},
        {"pack": True, "max_length": 200},
        {"trained_modules": ("projector",)},
        {"schedule": "linear", "min_learning_rate": 1e-3, "warmup": 2, "max_grad_norm": None},
        {"dora": True, "rslora": True, "ranks": {"q_proj": 1}},
        {"targets": ("vision", "projector", "all-linear")},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_other_ways_to_train_learn_too(settings, changes):
    settings = replaced(settings, **changes)
    result = trained(settings)
    losses = [entry["loss"] for entry in log_of(result.output) if "loss" in entry]
    assert losses[-1] < losses[0] - 0.5
    model, _ = mllama.load(settings.model, "float32", "cpu", adapter=result.trained)
    weights = load_file(result.output / "checkpoints/step-00000006/weights.safetensors")
    assert all(tensor.dtype == torch.float32 for tensor in weights.values())
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], weights[name]) for name in weights)


@pytest.mark.parametrize("name", ["workers", "gradient_checkpointing", "cache_features"])
def test_what_does_not_change_the_numbers(settings, tmp_path, name):
    value = {
        "workers": 2,
        "gradient_checkpointing": True,
        "cache_features": str(tmp_path / "files"),
    }
    trained(settings)
    trained(replaced(settings, output=str(tmp_path / "other"), **{name: value[name]}))
    pairs = zip(log_of(tmp_path / "run"), log_of(tmp_path / "other"), strict=True)
    assert all(one == pytest.approx(other, rel=1e-5) for one, other in pairs)
    assert (name == "cache_features") == any((tmp_path / "files").glob("**/*.safetensors"))


def test_method_full_writes_a_model_that_loads(settings):
    given = dataclasses.asdict(settings)
    names = ("rank", "dropout")
    settings = TrainSettings(
        **{name: value for name, value in given.items() if name not in names} | {"method": "full"}
    )
    settings = replaced(settings, learning_rate=1e-3)
    result = trained(settings)
    model, processor = mllama.load(result.trained, "float32", "cpu")
    weights = load_file(result.output / "checkpoints/step-00000006/weights.safetensors")
    own = dict(model.named_parameters())
    assert own.keys() == weights.keys()
    assert all(torch.equal(own[name], weights[name]) for name in weights)
    assert mllama.ask(None, "Say 3.", model, processor, max_new_tokens=2) is not None


def test_an_adapter_is_trained_further(settings, finished, tmp_path):
    output, first = finished
    given = dataclasses.asdict(settings)
    names = ("rank", "dropout")
    settings = TrainSettings(
        **{name: value for name, value in given.items() if name not in names}
        | {"adapter": str(output / "adapter")}
    )
    trained(settings)
    assert log_of(tmp_path / "run")[0]["loss"] < log_of(output)[0]["loss"] - 1


def test_pefts_adapter_of_every_layer_is_trained_further(family_folder, data, tmp_path):
    """PEFT's names reach a layer of LLaVA's encoder that is not computed."""
    from transformers import AutoModelForImageTextToText

    folder = family_folder("llava, clip")
    stock = AutoModelForImageTextToText.from_pretrained(folder)
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(stock, config).save_pretrained(tmp_path / "start")
    settings = TrainSettings(
        model=str(folder),
        data=str(data),
        adapter=str(tmp_path / "start"),
        output=str(tmp_path / "run"),
        max_steps=2,
        batch_size=5,
        dtype="float32",
        device="cpu",
    )
    trained(settings)
    files = [tmp_path / name / "adapter_model.safetensors" for name in ("start", "run/adapter")]
    changed = [
        not torch.equal(one, other)
        for one, other in zip(*(load_file(file).values() for file in files), strict=True)
    ]
    assert changed.count(False) == 2 and len(changed) == 2 * (2 + 3)  # A and B of the last layer


def test_the_learning_rate_rises_and_falls():
    settings = TrainSettings(
        data="x/y", learning_rate=1.0, min_learning_rate=0.2, warmup=4, max_steps=12
    )
    course = Course(settings, rows=5)
    rates = [course.learning_rate(step) for step in range(1, 14)]
    assert rates[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates[4:] == sorted(rates[4:], reverse=True) and rates[12] == pytest.approx(0.2)
    assert rates[8] == pytest.approx(0.6)  # half of the cosine
    linear = Course(replaced(settings, schedule="linear"), rows=5)
    assert linear.learning_rate(7) == pytest.approx(0.8)


def test_every_row_is_trained_once_in_an_epoch():
    settings = TrainSettings(data="x/y", batch_size=2, accumulation=3, epochs=3)
    course = Course(settings, rows=10, processes=2)
    assert (course.per_step, course.steps, course.steps_per_epoch) == (12, 3, 1)
    seen = []
    for step in range(1, course.steps + 1):
        own = [course.batches(step, process) for process in range(2)]
        assert [len(part) for one in own for part in one] == [2] * 6
        # passes go round the processes, so that a step has the rows that one process would have
        seen += [row for parts in zip(*own, strict=True) for part in parts for row in part]
    for epoch in range(3):
        assert sorted(seen[10 * epoch : 10 * epoch + 10]) == list(range(10))
    assert seen[:10] != seen[10:20]
    other = Course(replaced(settings, seed=1), rows=10, processes=2)
    assert other.batches(1) != course.batches(1)


def test_rounding_adds_no_step():
    assert 0.07 * 100 > 7
    assert Course(TrainSettings(data="x/y", epochs=0.07), rows=100).steps == 7
    assert Course(TrainSettings(data="x/y", warmup=0.07), rows=100).warmup_steps == 7


def test_rows_apart():
    kept, apart = held_out(10, 0.2, seed=0)
    assert sorted(kept + apart) == list(range(10)) and len(apart) == 2
    with pytest.raises(ValueError, match="eval_fraction"):
        held_out(1, 0.5, seed=0)


def test_the_summary_of_the_command(settings, tmp_path, capsys, monkeypatch):
    import yaml

    from mllama import cli

    given = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in dataclasses.asdict(settings).items()
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(given))
    assert cli.main(["train", str(path), "--max-steps", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["step"], found["trained"]) == (2, str(tmp_path / "run/adapter"))
    assert not math.isnan(found["loss"])
    assert cli.main(["train", str(path), "--max-steps", "2"]) == 2
    assert "--resume" in capsys.readouterr().err
    assert cli.main(["train", str(path), "--max-steps", "2", "--resume"]) == 0
    out = capsys.readouterr().out
    assert f"--adapter {tmp_path / 'run/adapter'}" in out and "2 of 2" in out
    assert cli.main(["train", str(path), "--check", "--json"]) == 0
    assert all(check["passed"] for check in json.loads(capsys.readouterr().out))
    assert cli.main(["train", str(path), "--check", "--resume"]) == 2
    assert cli.main(["train", str(path), "--rank", "many"]) == 2
    assert "--rank must be" in capsys.readouterr().err


def test_what_is_not_installed_or_not_here_is_refused(settings, monkeypatch):
    from accelerate import tracking

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ImportError, match="wandb is not installed"):
        train(replaced(settings, trackers=("wandb",)))
    with pytest.raises(ValueError, match="adamw8bit needs a CUDA device"):
        train(replaced(settings, optimizer="adamw8bit"))
    with pytest.raises(ValueError, match="frozen encoder"):
        train(
            replaced(settings, output=f"{settings.output}2", cache_features="x", targets="vision")
        )


def test_the_bar_on_a_terminal(settings, monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    trained(replaced(settings, max_steps=3, eval_every=3))
    shown = capsys.readouterr().err
    assert "3/3" in shown and "tokens/s" in shown and "GiB" in shown and "\r" in shown
    assert "mllama: step 3: evaluation loss" in shown
    assert "mllama: step 1/3" not in shown


def test_the_script_is_the_command(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["train.py", "--help"])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(__file__).parents[2] / "scripts/train.py"), run_name="__main__")
    assert end.value.code == 0 and "mllama train [CONFIG.yaml]" in capsys.readouterr().out
