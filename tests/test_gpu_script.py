"""scripts/gpu_tests.py as far as it runs without a GPU: what it says of a missing one, and how it
reads what pytest and compute-sanitizer say.
"""

import os
import signal
import sys
from collections import Counter

import pytest
import torch

from scripts import gpu_tests as script


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_it_fails_without_a_gpu(capsys):
    assert script.main([]) == 1
    assert "there is no GPU" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--minutes=0", "--minutes=nan", "--workers=0"])
def test_options_out_of_range(option, capsys):
    with pytest.raises(SystemExit):
        script.main([option])
    assert f"{option.partition('=')[0]} must be" in capsys.readouterr().err


TESTS = """
import pytest

def test_right(): pass

@pytest.mark.skip(reason="needs two GPUs")
def test_skipped(): pass

def test_wrong(): assert {right}
"""


@pytest.mark.parametrize("right", [True, False])
def test_tests_are_counted(tmp_path, right):
    path = tmp_path / "test_some.py"
    path.write_text(TESTS.format(right=right))
    outcome = script.run_tests(["-p", "no:cacheprovider", str(path)], 60)
    assert outcome.status == (script.PASSED if right else script.FAILED)
    assert outcome.detail == f"{1 + right} passed, {1 - right} failed, 1 skipped"
    assert outcome.skipped == {"needs two GPUs": 1}


def test_tests_that_do_not_end_fail(tmp_path):
    path = tmp_path / "test_long.py"
    path.write_text("import time\ndef test_long(): time.sleep(600)\n")
    outcome = script.run_tests([str(path)], 0.1)
    assert outcome.status == script.FAILED and "did not end" in outcome.detail


def test_an_interrupt_ends_the_tests(tmp_path):
    def interrupt(*_):
        raise KeyboardInterrupt

    code = "import os, sys, time; print(os.getpid(), file=open('pid', 'w')); time.sleep(600)"
    pid, before = tmp_path / "pid", signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 1)
        with pytest.raises(KeyboardInterrupt):
            script.run([sys.executable, "-c", code.replace("'pid'", repr(str(pid)))], 60)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid.read_text()), 0)


CLEAN = "24 passed in 3.00s\n========= ERROR SUMMARY: 0 errors\n"
RACES = "========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)\n"
WRITE = """========= Invalid __global__ write of size 4 bytes
=========     at void mllama::cuda::rms_norm<float, 4>(mllama::cuda::Args)+0x50
"""
# In another's kernel, called by ours.
FRAME = "=========     Host Frame: mllama::(anonymous namespace)::rms_norm in _C.so\n"
READ = "========= Error: Race reported between Write access at void mllama::cuda::product()+0x8\n"


@pytest.mark.parametrize(
    ("output", "code", "status"),
    [
        (CLEAN, 0, "PASSED"),
        (FRAME + CLEAN, 0, "PASSED"),
        (WRITE + CLEAN, 0, "FAILED"),
        ("24 passed\n" + RACES.replace("1", "0"), 0, "PASSED"),
        (CLEAN, 1, "FAILED"),
        (CLEAN, None, "FAILED"),
        ("24 passed\n", 0, "FAILED"),
        (READ + CLEAN, 0, "FAILED"),
        ("========= Error: Device not supported\n", 1, "SKIPPED"),
    ],
)
def test_what_compute_sanitizer_says(output, code, status):
    assert script.read_sanitizer(output, code, 60).status == getattr(script, status)


def test_the_summary_says_what_was_skipped_and_why():
    outcome = script.Outcome(script.PASSED, "1 passed", Counter({"needs two GPUs": 3}))
    lines = list(script.summary([("operators", 12.3, outcome)]))
    assert lines == [
        "operators  passed    12 s  1 passed",
        "skipped in operators: 3 x needs two GPUs",
    ]
