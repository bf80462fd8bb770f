"""The benchmarks' harness; the timings themselves are never asserted."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks import harness
from benchmarks.__main__ import main
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
