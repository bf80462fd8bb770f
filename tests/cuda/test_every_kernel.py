"""Every operator's CUDA kernels once; scripts/gpu_tests.py runs this under compute-sanitizer."""

import copy

import pytest
import torch

import devices
import emulated
import mllama
from helpers import assert_close
from kernel_calls import ALL_CALLS, CALLS, FLOATS
from mllama import _ext
from mllama.runtime.session import Session
from tiny.pairs import pair

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 4e-2, torch.float16: 5e-3}


def test_every_operator_has_calls():
    operators = (
        emulated.operators()
        if devices.is_emulated()
        else _ext.load().build_info()["cuda_operators"].split()
    )
    assert operators and set(operators) - {"decode"} <= CALLS.keys()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", ALL_CALLS)
def test_values(name, dtype, monkeypatch):
    """Against the references on the CPU."""
    call = ALL_CALLS[name]
    typed = call.typed(dtype)
    actual = call.results(typed.to(devices.tensor_device()))
    if devices.is_emulated():
        assert emulated.take_counters().launches, "no CUDA kernel has run"
    monkeypatch.setattr("mllama.ops._dispatch._EXTENSION", None)
    expected = call.results(typed.map(torch.Tensor.float, keep=call.keep))
    for k, (result, wanted) in enumerate(zip(actual, expected, strict=True)):
        if wanted.is_floating_point():
            assert_close(result, wanted, TOLERANCE[dtype], f"result {k}")
        else:
            assert torch.equal(result.cpu(), wanted), f"result {k}"


@pytest.mark.parametrize("weights", ["f32", "int4"])
def test_decode_step(weights, monkeypatch):
    """By a session, whose tokens are those of the references on the CPU."""
    model = mllama.optimize(copy.deepcopy(pair("llama").ours), weights)
    there, batch = copy.deepcopy(model).to(devices.tensor_device()), pair("llama").inputs()

    def tokens(model):
        found = Session(model).generate(batch, max_new_tokens=6, eos_token_id=())
        return [row.token_ids for row in found.completions]

    actual = tokens(there)
    monkeypatch.setattr("mllama.ops._dispatch._EXTENSION", None)
    assert actual == tokens(model)
