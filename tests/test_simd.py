"""The vector layer's conversions, tested by add_rms_norm's second result: hidden = round(x +
residual), bit for bit as torch's.
"""

import os
import subprocess
import sys

import pytest
import torch

from helpers import instruction_set, instruction_sets, needs_kernels
from mllama import _ext
from mllama.ops import add_rms_norm

pytestmark = needs_kernels


@pytest.mark.parametrize("isa", instruction_sets() if not _ext.disabled() else [])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_conversions_are_exact(isa, dtype):
    every = (
        torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).view(256, 256)
    )
    # Partners: zero (the round trip), itself (overflow), a shuffle (rounding at every distance),
    # the smallest subnormal.
    shuffled = every.flatten()[
        torch.randperm(2**16, generator=torch.Generator().manual_seed(0))
    ].view(256, 256)
    smallest = torch.ones(256, 256, dtype=torch.int16).view(dtype)
    with instruction_set(isa):
        for partner in (torch.zeros_like(every), every, shuffled, smallest):
            hidden = add_rms_norm(every, partner, torch.ones(256))[1]
            expected = (every.double() + partner.double()).to(torch.float32).to(dtype)
            assert torch.equal(hidden.isnan(), expected.isnan())
            bits, wanted = hidden.view(torch.int16), expected.view(torch.int16)
            assert torch.equal(bits[~expected.isnan()], wanted[~expected.isnan()])


def test_environment_lowers_the_instruction_set():
    code = "from mllama import _ext; print(_ext.load().isa())"
    environment = {**os.environ, "MLLAMA_CPU_ISA": "scalar"}
    assert (
        subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True
        ).stdout.strip()
        == "scalar"
    )


def test_unknown_instruction_set_is_refused():
    with pytest.raises(ValueError, match="scalar.*'avx9'"):
        _ext.load().set_isa("avx9")


def test_a_weaker_set_is_never_missing():
    """The table's order: a CPU that has one has all before it."""
    module = _ext.load()
    names = module.build_info()["instruction_sets"].split()
    assert names[0] == "scalar" and instruction_sets()[-1] == module.best_isa()
    for name in instruction_sets():
        with instruction_set(name):
            assert module.isa() == name
    for name in names[len(instruction_sets()) :]:
        with pytest.raises(ValueError, match=name):
            module.set_isa(name)


def test_cuda_kernels_need_a_toolkit():
    built = _ext.load().build_info()
    assert bool(built["cuda_operators"]) == bool(built["cuda_toolkit"])
    # decode_step has no file of kernels on the CPU: it calls those of the others.
    assert set(built["cuda_operators"].split()) <= {*built["operators"].split(), "decode"}
