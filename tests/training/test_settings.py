"""A run's settings: one table for YAML, flags and Python."""

import argparse
import dataclasses
import re
from pathlib import Path

import pytest

from mllama.train.keys import add_flag, default_text, of_flag
from mllama.train.run import FREE
from mllama.train.settings import GROUPS, TrainSettings, keys, load_settings


@pytest.fixture
def config(tmp_path):
    """config(text) -> path of a YAML file."""

    def write(text: str | bytes):
        path = tmp_path / "config.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return path

    return write


def test_yaml_flags_and_python_give_the_same(config):
    path = config(
        "data: some/set\nlearning_rate: 2e-3\nepochs: 3\ntargets: [attn, 're:.*fc1']\n"
        "ranks: {attn: 4}\npack: true\nmax_length: 64\neval_fraction: .2\nmax_grad_norm: null\n"
    )
    parser = argparse.ArgumentParser()
    for field in keys().values():
        add_flag(parser, field)
    words = "--data some/set --learning-rate 2e-3 --epochs 3 --targets attn re:.*fc1 --ranks attn=4"
    words += " --pack --max-length 64 --eval-fraction .2 --max-grad-norm none"
    given = vars(parser.parse_args(words.split()))
    flags = {name: of_flag(keys()[name], value) for name, value in given.items()}
    expected = TrainSettings(
        data="some/set",
        learning_rate=2e-3,
        epochs=3.0,
        targets=("attn", "re:.*fc1"),
        ranks={"attn": 4},
        pack=True,
        max_length=64,
        eval_fraction=0.2,
        max_grad_norm=None,
    )
    assert load_settings(path) == load_settings(None, flags) == expected
    assert load_settings(path, {"pack": False, "seed": 3}).pack is False


def test_none_stands_for_an_empty_list(config):
    path = config("data: some/set\nranks: null\ntrained_modules: null\ntrackers: null\n")
    flags = {name: of_flag(keys()[name], ["none"]) for name in ("ranks", "trackers")}
    assert load_settings(path) == load_settings(path, flags) == TrainSettings(data="some/set")


def test_every_default_is_of_its_key():
    settings = TrainSettings(data="some/set")
    assert TrainSettings(**dataclasses.asdict(settings)) == settings


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("learning-rate: 1", "did you mean learning_rate"),
        ("rank: 1.5", "rank"),
        ("rank: true", "rank"),
        ("rank: 0", "rank"),
        (f"rank: {10**30}", "rank"),
        ("epochs: .inf", "epochs"),
        ("epochs: .nan", "epochs"),
        ("targets: [attn, attn]", "targets"),
        ("targets: [[attn]]", "targets"),
        ("targets: []", "targets"),
        ("ranks: [4]", "ranks"),
        ("ranks: {attn: x}", "ranks"),
        ("schedule: step", "schedule"),
        ("pack: 1", "pack"),
        ("trackers: [mlflow]", "trackers"),
        ("model: null\noutput: null", "output"),
        ("method: full\nweights: int4", "weights"),
        ("method: full\nrank: 4", "rank"),
        ("method: full\ncache_features: x", "cache_features"),
        ("eval_every: 5", "eval_every"),
        ("eval_fraction: .1\neval_data: other/set", "eval_fraction"),
        ("pack: true", "max_length"),
        ("epochs: 2\nmax_steps: 5", "epochs"),
        ("schedule: constant\nmin_learning_rate: 1e-5", "min_learning_rate"),
        ("min_learning_rate: 1.0", "min_learning_rate"),
        ("warmup: 1.5", "warmup"),
        ("run_name: x", "run_name"),
        ("samples: 9", "samples"),
        ("adapter: x\ntrained_modules: [projector]", "trained_modules"),
        ("shard: true", "dtype"),
        ("shard: true\ndtype: float16", "dtype"),
        ("shard: true\ndtype: bfloat16\nweights: int8", "weights"),
        ("shard: true\ndtype: bfloat16\ncache_features: x", "cache_features"),
        ("shard: true\ndtype: bfloat16\noptimizer: adamw8bit", "adamw8bit"),
        ("checkpoint: sharded", "shard"),
        ("rank: 4\nrank: 8", "repeated"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("rank: !!python/object/apply:os.system [true]", "line 2"),
        ("rank: [", "line 2"),
        (b"rank: \xff", "UTF-8"),
        (b"rank: \0", "YAML"),
        ("rank: " + "[" * 5000, "nested"),
        ("rank: 2001-99-99", "YAML"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(config, text, named):
    start = b"data: some/set\n"
    path = config(start + (text if isinstance(text, bytes) else text.encode()))
    with pytest.raises(ValueError, match=named) as error:
        load_settings(path)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


@pytest.mark.parametrize("text", ["", "data", "- data: x", "rank: 4"])
def test_a_config_without_data(config, text):
    with pytest.raises(ValueError, match="data"):
        load_settings(config(text))


def test_files_that_do_not_exist(config, tmp_path):
    with pytest.raises(FileNotFoundError, match="no config"):
        load_settings(tmp_path / "missing.yaml")
    for text in ("data: x.jsonl", "data: a/b\nimage_folder: x", "data: a/b\nadapter: x"):
        name = text.rpartition("\n")[2].partition(":")[0]
        with pytest.raises(FileNotFoundError, match=f"{name}: no such"):
            load_settings(config(text))


def test_the_page_has_every_key_with_its_default():
    page = (Path(__file__).parents[2] / "docs/training.md").read_text()
    rows = re.findall(r"^\| `(\w+)` \| (.*?) \| (.*) \|$", page.partition("## Keys")[2], re.M)
    assert rows == [
        (name, default_text(field), field.metadata["what"]) for name, field in keys().items()
    ]
    assert re.findall(r"^### (.*)$", page, re.M) == [name.capitalize() for name in GROUPS.values()]
    free = page.partition("changed keys by name")[2].partition(".")[0]
    assert tuple(re.findall(r"`(\w+)`", free)) == FREE
