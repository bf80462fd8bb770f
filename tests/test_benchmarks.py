"""The benchmarks' harness; the timings themselves are never asserted."""

import json
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.__main__ import main
from benchmarks.models import report
from benchmarks.models.__main__ import main as bench_models
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
    lines = [line for line in capsys.readouterr().out.splitlines() if "two layers" in line]
    assert len(lines) == 7
    assert all(float(line.split("|")[4]) > 0 for line in lines)


def test_table_has_the_ratio_to_the_fastest_peer():
    content = {"date": "2026-11-29", "machine": "a machine"}
    content["groups"] = {"g": group("decode", mllama=30, llama_cpp=20, transformers=5)}
    (row,) = [line for line in report.table(content).splitlines() if "a model" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["a model", "int4", "decode", "30.0", "50%", "20.0", "", "", "5.0", "1.50"]


def test_results_of_other_groups_stay(tmp_path):
    path = tmp_path / "models-x.json"
    report.save(path, {"date": "1"}, {"a": group("decode", mllama=1), "b": group("decode")})
    report.save(path, {"date": "2"}, {"a": group("decode", mllama=2)})
    content = json.loads(path.read_text())
    assert content["date"] == "2" and list(content["groups"]) == ["a", "b"]
    assert content["groups"]["a"]["rows"][0]["tokens_per_second"] == 2


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
