"""The embedded model's training run: it learns in every phase, resumes exactly, and writes a folder
that the package reads.
"""

import json

import pytest
import torch
from torch import nn

from shapes.dataset import batches
from shapes.fast import bfloat16_products
from shapes.training import Plan, Run

PLAN = Plan(pictures=36, batch=4, turns=4, tower=0.34, frozen=0.33, warmup=8, average=0.5)


def steps(run: Run, count: int) -> list[dict]:
    source = batches(
        PLAN.seed, PLAN.batch, PLAN.pictures, run.seen // PLAN.batch, PLAN.turns, workers=0
    )
    return [run.step(next(source)) for _ in range(count)]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    made = Run(PLAN, tmp_path_factory.mktemp("run"))
    made.shown = steps(made, 8)
    made.save()
    return made


def test_three_phases(run):
    phases = [shown["phase"] for shown in run.shown]
    assert phases == ["tower"] * 4 + ["frozen"] * 3 + ["joint"]
    assert "answers" not in run.shown[0] and run.shown[4]["answers"] > 1
    assert run.shown[3]["dense"] < run.shown[0]["dense"]


def test_the_encoder_rests_while_the_decoder_learns(tmp_path):
    run = Run(PLAN, tmp_path)
    run.seen = 16  # in the frozen phase
    before = {name: p.detach().clone() for name, p in run.parameters.items()}
    steps(run, 1)
    changed = {name for name, p in run.parameters.items() if not torch.equal(p, before[name])}
    assert changed and not any(
        "vision_tower" in name or name.startswith("heads.") for name in changed
    )


def test_resumes_exactly(run):
    again = Run(PLAN, run.folder, resume=True)
    assert (again.seen, again.steps) == (32, 8)
    for name, p in run.parameters.items():
        assert torch.equal(p, again.parameters[name]) and torch.equal(
            run.average[name], again.average[name]
        )
    (first,), (second,) = steps(run, 1), steps(again, 1)
    assert first["answers"] == pytest.approx(second["answers"], rel=1e-5)
    for name, p in run.parameters.items():
        torch.testing.assert_close(p, again.parameters[name], rtol=1e-4, atol=1e-5)


def test_files_are_safetensors_and_json_only(run):
    assert {file.suffix for file in run.folder.iterdir()} <= {
        ".safetensors",
        ".json",
        ".jsonl",
        ".png",
    }
    assert json.loads((run.folder / "state.json").read_text())["plan"]["batch"] == PLAN.batch


def test_export_is_read_by_the_package(run, tmp_path):
    import mllama

    run.export(tmp_path / "model")
    model, processor = mllama.load(tmp_path / "model", dtype="float32", device="cpu")
    name = "language_model.layers.0.mlp.up_proj.weight"
    expected = run.average[f"model.{name}"].to(torch.bfloat16).float()
    assert torch.equal(model.state_dict()[name], expected)
    assert processor.tokenizer.convert_tokens_to_ids("<image>") == model.config.image_token_index


def test_rates_rise_hold_and_fall():
    plan = Plan(pictures=1000, batch=10, warmup=100, decay=0.5)
    factors = [plan.factor(seen) for seen in range(0, 1000, 10)]
    assert factors[0] == pytest.approx(0.1) and factors[20] == 1.0
    assert factors[60:] == sorted(factors[60:], reverse=True) and factors[-1] < 0.01


def test_bfloat16_products_are_close_to_the_exact_ones():
    torch.manual_seed(0)
    exact, fast = nn.Linear(64, 32), nn.Linear(64, 32)
    fast.load_state_dict(exact.state_dict())
    bfloat16_products(fast)
    x = torch.randn(3, 5, 64, requires_grad=True)
    y = x.detach().clone().requires_grad_()
    exact(x).square().sum().backward()
    fast(y).square().sum().backward()
    for a, b in (
        (x.grad, y.grad),
        (exact.weight.grad, fast.weight.grad),
        (exact.bias.grad, fast.bias.grad),
    ):
        assert (a - b).norm() < 0.02 * a.norm()
