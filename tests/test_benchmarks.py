"""The benchmarks' harness; the timings themselves are never asserted."""

import json
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch

import mllama
from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.gpu import operators as gpu_operators
from benchmarks.gpu.__main__ import main as bench_gpu
from benchmarks.gpu.__main__ import measure_contenders
from benchmarks.gpu.groups import groups as gpu_groups
from benchmarks.models import report
from benchmarks.models.__main__ import main as bench_models
from benchmarks.models.engines import MLLAMA
from benchmarks.models.files import TINY_TILED, Files
from benchmarks.models.groups import Case, Contender, Group
from benchmarks.models.measure import measure_group
from benchmarks.models.plot import draw
from benchmarks.models.worker import Worker, WorkerError
from helpers import needs_kernels
from mllama import _ext

ROOT = Path(__file__).parents[1]


@needs_kernels
def test_every_operator_has_a_benchmark():
    for operator in _ext.load().build_info()["operators"].split():
        assert (ROOT / f"benchmarks/ops/bench_{operator}.py").exists()


def test_cases_call_both_sides():
    calls = []

    def side(name):
        def function(x, y):
            calls.append(name)
            return x * y

        return function

    forward, both = harness.both_directions(
        "2x3", side("ours"), side("peer"), (torch.ones(2, 3), torch.ones(3)), differentiable=1
    )
    calls.clear()
    forward.ours()
    forward.peer()
    (gradient,) = both.ours()
    assert calls == ["ours", "peer", "ours"]
    assert gradient.shape == (2, 3)
    assert (forward.direction, both.direction) == ("forward", "forward+backward")


def test_table_and_csv(tmp_path, capsys):
    case = harness.Case("2x3", torch.bfloat16, "forward", lambda: None, lambda: None, bytes=8000)
    row = harness.table_row(harness.Row(case, ours=2e-6, peer=5e-6))
    assert row == ("2x3", "bfloat16", "forward", "2.0", "5.0", "2.50", "4.0", "")
    harness.print_table("title", [row])
    assert capsys.readouterr().out.splitlines()[1].startswith("title")
    harness.write_csv(tmp_path / "new" / "x.csv", ["a machine"], [row])
    assert (tmp_path / "new" / "x.csv").read_text().splitlines() == [
        "# a machine",
        ",".join(harness.HEADER),
        ",".join(row),
    ]


def test_unknown_benchmark_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "swiglue"])
    with pytest.raises(SystemExit) as caught:
        main()
    assert caught.value.code == 2
    assert "no benchmark of swiglue; there are add_rms_norm" in capsys.readouterr().err


# ---- whole models


def group(case: str, **rates: float) -> dict:
    """Results of a case by engine."""
    rows = [
        {
            "case": case,
            "engine": engine.replace("_", "."),
            "precision": "int4",
            "version": "1",
            "tokens_per_second": rate,
            "share_of_read": 0.5,
        }
        for engine, rate in rates.items()
    ]
    return {"model": "a model", "bits": "int4", "roofs": {"read_gb_per_second": 30.0}, "rows": rows}


def test_a_smoke_run_measures_every_action(capsys):
    bench_models(["--quick", "--threads", "1"])
    lines = [line.split("|") for line in capsys.readouterr().out.splitlines() if "|" in line]
    assert [float(cells[4]) > 0 for cells in lines if "two layers" in cells[1]] == [True] * 7
    ours = [cells[3:-1] for cells in lines if cells[1:3] == [" mllama ", " int4 "]]
    assert [cells[0].strip() for cells in ours] == ["text alone", "one tile", "four tiles"]
    assert all(float(cell) >= 0 for cells in ours[1:] for cell in cells[1:])  # none is missing
    assert sum(" f32 " in cells for cells in lines) == 2  # encoders, ours and transformers'


def test_a_smoke_run_of_the_gpus_benchmarks():
    """In a process of its own, since it makes the benchmarks' sizes the smallest. It fails where
    anything is missing.
    """
    command = [sys.executable, "-m", "benchmarks.gpu", "--quick", "--device", "cpu"]
    done = subprocess.run([*command, "--threads", "1"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    rows = [line for line in lines if line.startswith("  ")]
    assert [sum(f" {name} " in row for row in rows) for name in ("mllama", "transformers")] == [
        8,
        5,
    ]
    assert sum(" against " in line for line in lines) == len(gpu_operators.NAMES)


def test_every_operator_is_measured_on_a_gpu():
    benched = {path.stem.removeprefix("bench_") for path in ROOT.glob("benchmarks/ops/bench_*.py")}
    assert set(gpu_operators.NAMES) == benched


def test_the_gpus_benchmarks_fail_without_one(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    assert bench_gpu(["--only", "1b"]) == 1
    assert "there is no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--minutes=nan", "--rounds=0", "--threads=-1"])
def test_options_out_of_range(option, capsys):
    with pytest.raises(SystemExit):
        bench_gpu(["--quick", "--device=cpu", option])
    assert option.partition("=")[0] in capsys.readouterr().err.splitlines()[-1]


def test_contenders_on_a_gpu_share_the_time(monkeypatch):
    """Where none is left, they are listed."""
    limits = []

    def measured(group, files, threads, rounds, device, limit):
        limits.append(limit)
        return {"rows": [{"case": group.cases[0].name}], "roofs": {"read_gb_per_second": 1.0}}

    monkeypatch.setattr("benchmarks.gpu.__main__.measure_group", measured)
    arguments = Namespace(quick=True, threads=1, device="cpu")
    contenders = gpu_groups(tiny=True)["1b"]
    found = measure_contenders(contenders, None, arguments, 100)
    assert len(limits) == len(found["rows"]) == 2 and 45 < limits[0] < 50 < 95 < limits[1]
    assert found["left_out"] == ["mllama int4, prefill 8", "transformers f32, prefill 8"]
    found = measure_contenders(contenders, None, arguments, 0)
    assert len(limits) == 2 and len(found["left_out"]) == 4 and not found["rows"]


def test_table_has_the_ratio_to_the_fastest_peer():
    content = {"date": "2026-11-29", "machine": "a machine"}
    content["groups"] = {"g": group("decode", mllama=30, llama_cpp=20, transformers=5)}
    (row,) = [line for line in report.table(content).splitlines() if "a model" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["a model", "int4", "decode", "30.0", "50%", "20.0", "", "", "5.0", "1.50"]


def test_contenders_that_do_not_fit_together_are_loaded_one_by_one(monkeypatch):
    loaded = set()

    class Engine:
        facts, load_seconds, alive = {"version": "1", "actions": ["a", "b"]}, 1.0, True

        def __init__(self, worker, python, model, weights, threads, device, limit):
            loaded.add(weights)
            self.weights = weights

        def ask(self, action):
            assert loaded == {self.weights}
            found = {"seconds": 2.0, "tokens": 8} if action == "a" else {}
            return found | {"peak": 10**9, "more": {"stage_seconds": 0.5}}

        def close(self):
            loaded.remove(self.weights)

    monkeypatch.setattr("benchmarks.models.measure.Worker", Engine)
    contenders = [Contender(MLLAMA, name, name, lambda files: Path()) for name in ("x", "y")]
    cases = (Case("timed", "a"), Case("without tokens", "b"))
    group = Group("g", "m", "int4", tuple(contenders), cases, alone=True)
    rows = measure_group(group, None, 1, 2)["rows"]
    assert [(row["precision"], row["case"]) for row in rows] == [
        (name, case.name) for name in ("x", "y") for case in cases
    ]
    assert [row.get("tokens_per_second") for row in rows] == [4.0, None, 4.0, None]
    assert all(row["stage_seconds"] == 0.5 and row["load_seconds"] == 1 for row in rows)


def test_tables_of_the_vision_model():
    row = {"engine": "mistral.rs", "version": "1", "precision": "Q4K", "case": "one tile"}
    answer = row | {"load_seconds": 60, "first_token_seconds": 2.5, "peak_gb": 20.84}
    groups = {
        "11b-quarter": {"model": "shorter", "rows": [answer]},
        "11b-encoder": {"model": "encoder", "rows": [row | {"encoder_seconds": 1.234}]},
    }
    content = {"date": "2026-11-29", "machine": "a machine", "groups": groups}
    lines = [line for line in report.table(content).splitlines() if "mistral.rs" in line]
    assert [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines] == [
        ["mistral.rs 1", "Q4K", "one tile", "60.00", "", "", "", "2.50", "", "", "20.8"],
        ["mistral.rs 1", "Q4K", "1.23"],
    ]


def test_random_weights_have_the_savings_of_real_ones(tmp_path):
    """As in Meta's weights, tables are zero for tiles that an aspect ratio does not have, so that
    empty tiles are equal.
    """
    model, _ = mllama.load(Files(tmp_path, {}, TINY_TILED).encoder(), dtype="float32")
    tower = model.vision_tower
    tables = (
        tower.gated_positional_embedding.tile_embedding.weight,
        tower.pre_tile_positional_embedding.embedding.weight,
        tower.post_tile_positional_embedding.embedding.weight,
    )
    for table in tables:
        by_tile = table.unflatten(1, (4, -1)).abs().amax(-1)
        assert by_tile[0].tolist() == [0] * 4  # no image
        for (rows, columns), sizes in zip(
            tower.config.supported_aspect_ratios, by_tile[1:], strict=True
        ):
            assert (sizes > 0).tolist() == [tile < rows * columns for tile in range(4)]


def test_results_of_other_groups_stay(tmp_path):
    path = tmp_path / "models-x.json"
    report.save(path, {"date": "1"}, {"a": group("decode", mllama=1), "b": group("decode")})
    report.save(path, {"date": "2"}, {"a": group("decode", mllama=2)})
    content = json.loads(path.read_text())
    assert content["date"] == "2" and list(content["groups"]) == ["a", "b"]
    assert content["groups"]["a"]["rows"][0]["tokens_per_second"] == 2


def test_an_interrupt_leaves_the_results_that_were_there(tmp_path, monkeypatch):
    path = tmp_path / "models-x.json"
    report.save(path, {"date": "1"}, {})
    before, write = path.read_text(), Path.write_text

    def interrupted(self, text):
        write(self, text[:9])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report.save(path, {"date": "2"}, {})
    assert path.read_text() == before and list(tmp_path.iterdir()) == [path]


def test_readme_has_the_newest_results():
    text = report.README.read_text()
    assert text.split(report.BEGIN)[1].split(report.END)[0] == report.table(report.newest())


def test_picture_is_small(tmp_path):
    pytest.importorskip("matplotlib")
    content = {"groups": {"g": group("decode", mllama=30, llama_cpp=20), "cold": {"rows": []}}}
    draw(content, tmp_path / "x.png")
    assert 0 < (tmp_path / "x.png").stat().st_size < 100_000


def test_a_worker_that_fails_says_why(tmp_path):
    with pytest.raises(WorkerError, match="no-such-folder"):
        Worker("mllama", sys.executable, tmp_path / "no-such-folder", "int4", 1)


@pytest.mark.parametrize(
    "options", [["--threads", "0"], ["--rounds", "0"], ["--only", "2b"]], ids=" ".join
)
def test_options_out_of_range_are_refused(options, capsys):
    with pytest.raises(SystemExit) as caught:
        bench_models(options)
    assert caught.value.code == 2
    assert options[0] in capsys.readouterr().err
