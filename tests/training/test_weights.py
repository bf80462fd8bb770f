"""Runs of `mllama.train` beside packed weights (`weights`): as beside the dense weights that these
stand for.
"""

import signal
import warnings

import pytest
import torch
from safetensors.torch import load_file

import mllama
from helpers import needs_kernels
from lora.test_packed_training import unpacked
from mllama.nn.packed import PackedLinear
from mllama.train.prepare import prepare_model, trained_parameters
from mllama.train.run import train
from training.runs import assert_same_run, interrupt, log_of, replaced, trained

pytest.importorskip("accelerate")
pytestmark = needs_kernels
EVERY = ("vision", "projector", "all-linear")


@pytest.fixture(scope="module", params=["f32", "bf16", "int8", "int4"])
def packing(request, model_folder, tmp_path_factory):
    """(weights, a folder of the same model with the dense weights that packed ones stand for)."""
    packed, processor = mllama.load(model_folder, "float32", "cpu", weights=request.param)
    dense, _ = mllama.load(model_folder, "float32", "cpu")
    folder = tmp_path_factory.mktemp("dense")
    unpacked(dense, packed).save_pretrained(folder)
    processor.save_pretrained(folder)
    return request.param, folder


def test_a_run_is_that_of_the_dense_weights(packing, settings, tmp_path):
    """Adapters of the encoder too, with dropout and accumulation. Evaluations round activations, as
    inference does beside packed weights.
    """
    weights, folder = packing
    settings = replaced(settings, targets=EVERY, max_steps=4, eval_every=2)
    trained(replaced(settings, weights=weights))
    trained(replaced(settings, model=str(folder), output=str(tmp_path / "dense")))
    found, expected = (log_of(tmp_path / name) for name in ("run", "dense"))
    losses = [entry["loss"] for entry in found if "loss" in entry]
    assert len(losses) == 4 and losses[-1] < losses[0] - 1
    for one, other in zip(found, expected, strict=True):
        assert one == pytest.approx(other, rel=1e-4 if "loss" in one else 1e-2)


@pytest.mark.parametrize("weights", ["int8", "int4"])
def test_adapters_are_trained_and_nothing_else(settings, weights):
    settings = replaced(settings, weights=weights, dtype="bfloat16", gradient_checkpointing=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        result = trained(settings)
    model, _, adapted = prepare_model(settings, quiet=True)
    layers = [layer.linear for layer in adapted.layers.values()]
    assert {type(layer) for layer in layers} == {PackedLinear}
    before = trained_parameters(model)
    after = load_file(result.output / "checkpoints/step-00000006/weights.safetensors")
    assert before.keys() == after.keys() and len(after) == 2 * len(layers)
    assert all(".lora_" in name and after[name].dtype == torch.float32 for name in after)
    assert not any(torch.equal(after[name], before[name]) for name in after)
    model.eval()
    mllama.load_lora(model, result.trained)
    own = dict(model.named_parameters())
    assert all(torch.equal(own[name], after[name]) for name in after)


def test_stopped_and_resumed_equals_uninterrupted(settings, tmp_path, monkeypatch):
    """The run that is not interrupted is of a folder of packed weights."""
    mllama.quantize(settings.model, tmp_path / "packed", "int4")
    whole = replaced(settings, model=str(tmp_path / "packed"), output=str(tmp_path / "whole"))
    trained(whole)
    settings = replaced(settings, weights="int4")
    with monkeypatch.context() as patch:
        interrupt(patch, signal.SIGTERM, 3)
        assert train(settings).step == 3
    with pytest.raises(ValueError, match=r"weights \(was 'int4'\)"):
        train(replaced(settings, weights="int8"), resume=True)
    trained(settings, resume=True)
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_what_is_refused(settings, capsys):
    from mllama import cli

    for wrong in ("int3", "q4_k", "auto"):
        with pytest.raises(ValueError, match="weights"):
            replaced(settings, weights=wrong)
    words = ["train", "--data", settings.data, "--model", settings.model, "--device", "cpu"]
    assert cli.main([*words, "--weights", "int3"]) == 2
    assert "--weights" in capsys.readouterr().err
    assert cli.main([*words, "--weights", "int4", "--method", "full"]) == 2
    assert "weights" in capsys.readouterr().err
