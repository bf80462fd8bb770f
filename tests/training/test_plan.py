"""Plans against measured runs, and what they say of what fits."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers import needs_kernels
from mllama.cli import main
from mllama.plan import machine
from mllama.plan.allocations import WORKSPACE
from mllama.plan.fakes import FROZEN, GRADIENTS, OPTIMIZER, TRAINED
from mllama.plan.machine import available_memory, parse_bytes
from mllama.plan.run import LIBRARIES, plan
from mllama.plan.workspaces import TILE_ELEMENTS
from mllama.train.settings import TrainSettings, load_settings
from tiny import folders, stock, tokenizers
from training.runs import write_rows

MEASURE = Path(__file__).with_name("measured_run.py")
LONG = {"question": "Say it.", "answer": "so it is " * 40}
NAMES = {"rank": 4, "device": "cpu", "dtype": "float32"}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with rows of images and texts, long texts, and a text model."""
    folder = tmp_path_factory.mktemp("place")
    write_rows(folder)
    (folder / "long.jsonl").write_text((json.dumps(LONG) + "\n") * 4)
    tokenizer = tokenizers.make()
    tokenizer.chat_template = folders.TEXT_TEMPLATE
    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 3}
    ids = {name: getattr(tokenizer, name) for name in ("eos_token_id", "pad_token_id")}
    model = stock.make(
        "llama", **sizes, **ids, bos_token_id=None, vocab_size=8000, max_position_embeddings=1024
    )
    model.save_pretrained(folder / "llama")
    tokenizer.save_pretrained(folder / "llama")
    return folder


def settings_in(place: Path, **keys) -> TrainSettings:
    """Of the embedded model and rows with images, or of the text model and long rows."""
    data = "long.jsonl" if keys.get("model") else "rows.jsonl"
    given = NAMES | {"data": str(place / data), "output": str(place / "run"), "samples": 0}
    if keys.get("method") == "full":
        del given["rank"]
    return load_settings(None, given | keys)


def measured(settings: TrainSettings, folder: Path) -> int:
    """The peak of a run of three steps, in a process of its own."""
    settings = dataclasses.replace(settings, max_steps=3, output=str(folder / "run"))
    kept = {name: value for name, value in dataclasses.asdict(settings).items() if value}
    (folder / "settings.json").write_text(json.dumps(kept))
    done = subprocess.run(
        [sys.executable, str(MEASURE), str(folder / "settings.json")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout.splitlines()[-1])


def planned(settings: TrainSettings) -> int:
    """What torch allocates at the peak."""
    parts = plan(settings, memory=2**40).parts
    return sum(size for part, size in parts.items() if part != LIBRARIES)


CONFIGURATIONS = {
    "adapters, images": {"batch_size": 4},
    "image encoder, checkpointing, accumulation": {
        "batch_size": 2,
        "accumulation": 2,
        "gradient_checkpointing": True,
        "targets": ("attn", "mlp", "vision", "projector"),
    },
    "full, text": {"model": "llama", "data": "long.jsonl", "method": "full", "batch_size": 2},
    "adapters, text, int8, bfloat16": {
        "model": "llama",
        "data": "long.jsonl",
        "batch_size": 4,
        "dtype": "bfloat16",
        "weights": "int8",
    },
    "adapters, text, int4": {"model": "llama", "data": "long.jsonl", "weights": "int4"},
}


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=needs_kernels if "weights" in keys else ())
        for name, keys in CONFIGURATIONS.items()
    ],
)
def test_within_a_tenth_of_the_measured_peak(place, tmp_path, name):
    keys = CONFIGURATIONS[name]
    paths = {key: str(place / keys[key]) for key in ("model", "data") if key in keys}
    settings = settings_in(place, **keys | paths)
    assert planned(settings) == pytest.approx(measured(settings, tmp_path), rel=0.1)


def test_parts_are_those_of_the_model(place):
    full = plan(settings_in(place, model=str(place / "llama"), method="full"), 2**40)
    count = full.parts[TRAINED]
    assert FROZEN not in full.parts and full.parts[OPTIMIZER] == pytest.approx(2 * count, rel=0.01)
    lora = plan(settings_in(place, model=str(place / "llama"), accumulation=2), 2**40)
    assert lora.parts[FROZEN] == pytest.approx(count, rel=0.01)
    # q, k, v, o, gate, up, down of 3 layers, rank 4, in float32
    config = json.loads((place / "llama/config.json").read_text())
    keys = config["num_key_value_heads"] * config["head_dim"]
    queries = config["num_attention_heads"] * config["head_dim"]
    pairs = 256 + queries, 256 + keys, 256 + keys, queries + 256, 1024, 1024, 1024
    assert lora.parts[TRAINED] == 4 * 4 * 3 * sum(pairs)
    assert lora.parts[GRADIENTS] == lora.parts[TRAINED]  # of the pass before
    assert lora.parts[LIBRARIES] > 10**8
    assert lora.total == sum(lora.parts.values())


def test_activations_grow_with_what_is_computed(place):
    model = str(place / "llama")

    def activations(**keys) -> int:
        length = keys.pop("length", None)
        found = plan(settings_in(place, model=model, **keys), 2**40, length)
        assert length in (None, found.work["tokens"])
        return found.parts["activations"]

    one = activations()
    assert activations(batch_size=3) == pytest.approx(3 * one, rel=0.15)
    assert activations(length=800) > 1.5 * one
    assert activations(gradient_checkpointing=True, batch_size=3) < 0.6 * activations(batch_size=3)


def test_images_cost_less_where_their_features_are_kept(place):
    every = ("vision", "projector", "attn", "mlp")
    trained = plan(settings_in(place, batch_size=4, targets=every), 2**40)
    frozen = plan(settings_in(place, batch_size=4), 2**40)
    cached = plan(settings_in(place, batch_size=4, cache_features=str(place / "f")), 2**40)
    assert trained.parts["activations"] > frozen.parts["activations"]
    assert cached.parts["activations"] <= frozen.parts["activations"]
    assert frozen.work["images"] >= 1


def test_samples_count_where_there_is_an_evaluation(place):
    without = plan(settings_in(place), 2**40)
    with_them = plan(settings_in(place, eval_fraction=0.2, samples=4), 2**40)
    assert without.samples == {}
    assert with_them.samples["key-value cache"] > 0


def test_what_does_not_fit_has_switches_with_their_figures(place):
    settings = settings_in(place, method="full", batch_size=4)
    needed = plan(settings, 2**40)
    assert needed.fits and needed.switches == []
    budget = int((needed.total - 2**20) / 0.9)
    found = plan(settings, budget)
    assert found.fits is False
    named = [tuple(switch.changes) for switch in found.switches[:3]]
    assert {("gradient_checkpointing",), ("batch_size", "accumulation"), ("method",)} == set(named)
    totals = [switch.total for switch in found.switches[:3]]
    assert totals == sorted(totals) and totals[0] < needed.total
    best = found.switches[0]
    assert best.fits == (best.total <= 0.9 * budget)
    # The figure is that of the settings themselves.
    again = plan(dataclasses.replace(settings, **best.changes), 2**40)
    parts = sum(size for part, size in again.parts.items() if part != LIBRARIES)
    assert best.total - found.parts[LIBRARIES] == parts


@needs_kernels
def test_packed_weights_are_switches_of_adapters(place):
    settings = settings_in(place, model=str(place / "llama"))
    needed = plan(settings, 2**40)
    found = plan(settings, int((needed.total - 2**20) / 0.9))
    by_name = {str(switch.changes.get("weights")): switch for switch in found.switches}
    assert by_name["int4"].total < by_name["int8"].total < needed.total
    again = plan(dataclasses.replace(settings, weights="int4"), 2**40)
    assert again.parts[WORKSPACE] == 4 * 8000 * 128  # 2**20 / 8000 columns, in groups of 32
    assert by_name["int4"].total - found.parts[LIBRARIES] == again.total - again.parts[LIBRARIES]


def test_switches_together_where_none_is_enough(place):
    found = plan(settings_in(place, method="full", batch_size=4), 2**20)
    assert not any(switch.fits for switch in found.switches)
    assert len(found.switches[-1].changes) == 4  # all of them


def test_the_command(place, capsys):
    words = ["plan", "--data", str(place / "long.jsonl"), "--model", str(place / "llama")]
    words += ["--device", "cpu", "--method", "full"]
    assert main([*words, "--memory", "64GB"]) == 0
    page = capsys.readouterr().out
    assert "optimizer" in page and "fits in 59.60 GiB" in page
    assert main([*words, "--memory", "10MB", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False and found["memory"] == 10**7 and found["switches"]
    assert main([*words, "--memory", "much"]) == 2
    assert "much" in capsys.readouterr().err
    for length in ("3", "1025"):  # below the longest row's, and beyond the model's positions
        assert main([*words, "--memory", "64GB", "--length", length]) == 2
        assert "length" in capsys.readouterr().err


@pytest.mark.parametrize("device", TILE_ELEMENTS)
def test_tiles_are_the_operators_own(device):
    header = Path(__file__).parents[2] / f"csrc/ops/unpack_{device}.h"
    shift = TILE_ELEMENTS[device].bit_length() - 1
    assert f"kTileElements = int64_t{{1}} << {shift};" in header.read_text()


@pytest.mark.parametrize(
    ("text", "size"),
    [("8GB", 8 * 10**9), ("7.5 GiB", 15 * 2**29), ("512m", 512 * 10**6), ("1024", 1024)],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["", "GB", "-1GB", "8XB", "8iB", "1e9", "0GB", "9" * 20])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="size"):
        parse_bytes(text)


def test_free_memory_is_within_a_container_s_limit(tmp_path, monkeypatch):
    files = {name: tmp_path / name for name in ("meminfo", "max", "current")}
    files["meminfo"].write_text("MemTotal: 9 kB\nMemAvailable:    3000 kB\n")
    files["max"].write_text("2000000")
    files["current"].write_text("500000")
    monkeypatch.setattr(machine, "_MEMINFO", files["meminfo"])
    monkeypatch.setattr(machine, "_LIMITS", ((files["max"], files["current"]),))
    assert available_memory(torch.device("cpu")) == 1_500_000
    files["max"].write_text("max\n")
    assert available_memory(torch.device("cpu")) == 3000 * 1024
