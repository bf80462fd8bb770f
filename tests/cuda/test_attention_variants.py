"""Attention's CUDA kernels on every architecture, and in every order of threads.

tests/ops/test_attention.py has all options, on one architecture and in orders that change from
launch to launch.
"""

import itertools

import pytest
import torch

import devices
import emulated
from helpers import Sample, assert_close
from mllama.ops import attention
from mllama.ops.attention import reference

SCHEDULES = list(itertools.product(emulated.ORDERS, emulated.ARRIVALS))
# As in tests/ops/test_attention.py; bf16 gradients carry more roundings.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def sample(batch, queries, keys, heads, kv_heads, size, **masks):
    q = torch.randn(batch, queries, heads, size)
    k, v = torch.randn(2, batch, keys, kv_heads, size)
    return Sample((q, k, v), masks)


SAMPLES = {
    "many rows": sample(1, 37, 70, 2, 1, 64, causal=True, window=50),
    "a tile but one key": sample(1, 20, 63, 1, 1, 64),
    "few rows, parts of the keys": sample(2, 2, 290, 4, 2, 40, softcap=3.0),
    "many rows, parts of the keys": sample(
        1, 9, 140, 2, 1, 72, causal=True, key_mask=torch.rand(1, 140) > 0.3
    ),
    "padding within a tile": sample(1, 20, 40, 1, 1, 64, key_mask=torch.arange(40)[None] < 30),
    "head size 128": sample(1, 70, 70, 1, 1, 128, causal=True),
    "largest head size, many rows": sample(1, 20, 40, 1, 1, 256, causal=True),
    "largest head size, few rows": sample(1, 3, 40, 2, 1, 250, key_bias=torch.randn(1, 40)),
}


def check(sample: Sample, dtype: torch.dtype, what: str) -> None:
    def results(function, call):
        leaves = [tensor.requires_grad_() for tensor in call.args]
        out = function(*leaves, **call.kwargs)
        return out, *torch.autograd.grad(out.float().sin().sum(), leaves)

    typed = sample.map(lambda tensor: tensor.detach().to(dtype), keep=("key_bias",))
    exact = typed.map(lambda tensor: tensor.detach().float())
    names = ("result", "gradient of q", "gradient of k", "gradient of v")
    bounds = (TOLERANCE[dtype], *3 * [4 * TOLERANCE[dtype]])
    for actual, expected, name, bound in zip(
        results(attention, typed), results(reference, exact), names, bounds, strict=True
    ):
        assert_close(actual, expected, bound, f"{what}, {name}")


@pytest.mark.parametrize("architecture", [75, 86, 90])
@pytest.mark.parametrize("name", SAMPLES)
def test_architecture(name, architecture):
    """Each has its limit of shared memory, and sm_75 no bf16 in tensor cores."""
    own = emulated.architecture()
    if devices.is_compiled() and (architecture < 80) != (own < 80):
        pytest.skip(f"the kernels were compiled for sm_{own}")
    emulated.set_options(architecture=architecture)
    for dtype in TOLERANCE:
        check(SAMPLES[name], dtype, f"sm_{architecture}, {dtype}")


@pytest.mark.parametrize("name", ["many rows", "many rows, parts of the keys"])
@pytest.mark.parametrize(("order", "arrival"), SCHEDULES)
def test_schedule(name, order, arrival):
    """Asynchronous copies arrive at once or when they are waited for; neither is too early or late
    in any order of threads.
    """
    emulated.set_options(order, arrival, seed=3)
    for dtype in (torch.float32, torch.bfloat16):
        check(SAMPLES[name], dtype, f"{order}, {arrival}, {dtype}")
