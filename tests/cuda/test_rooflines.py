"""The scripts that write the estimates of docs/gpu-status.md."""

import itertools
import shutil
import subprocess

import pytest

from kernel_mutants import SOURCES
from occupancy import LIMITS, REGISTERS, occupancy, resident_blocks
from roofline_works import Work, works
from rooflines import CARDS, USAGE, main, microseconds

THREADS, SHARED = (32, 96, 128, 256, 1024), (0, 1000, 20736, 27648, 49152, 66560, 101376, 166912)
NVIDIAS = """
#include <climits>
#include <cstddef>
#include <cstdio>
#include <cuda_occupancy.h>
int main() {
    int architecture, threads, registers, warps, reserved;
    size_t shared, all_shared, most_shared;
    while (scanf("%d %d %d %zu %d %zu %zu %d", &architecture, &threads, &registers, &shared, &warps,
                 &all_shared, &most_shared, &reserved) == 8) {
        cudaOccDeviceProp device;
        device.computeMajor = architecture / 10, device.computeMinor = architecture % 10;
        device.maxThreadsPerBlock = 1024, device.maxThreadsPerMultiprocessor = 32 * warps;
        device.regsPerBlock = device.regsPerMultiprocessor = 65536, device.warpSize = 32;
        device.sharedMemPerBlock = 48 << 10, device.sharedMemPerMultiprocessor = all_shared;
        device.sharedMemPerBlockOptin = most_shared, device.reservedSharedMemPerBlock = reserved;
        device.numSms = 1;
        cudaOccFuncAttributes kernel;
        kernel.maxThreadsPerBlock = INT_MAX, kernel.numRegs = registers;
        kernel.numBlockBarriers = 1;
        kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
        kernel.maxDynamicSharedSizeBytes = shared;
        cudaOccDeviceState state;
        state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
        cudaOccResult result;
        cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &kernel,
                                                                     &state, threads, shared);
        printf("%d\\n", error ? -error : result.activeBlocksPerMultiprocessor);
    }
}
"""


def test_published_limits():
    """CUDA C++ programming guide, table of technical specifications per compute capability."""
    rows = {
        "resident threads": [1024, 2048, 1536, 2048],
        "resident blocks": [16, 32, 16, 32],
        "KiB of shared memory": [64, 164, 100, 228],
        "KiB of shared memory of a block": [64, 163, 99, 227],
    }
    limits = LIMITS.values()
    assert list(LIMITS) == [75, 80, 86, 90] and REGISTERS == 64 * 1024
    assert [32 * limit.warps for limit in limits] == rows["resident threads"]
    assert [limit.blocks for limit in limits] == rows["resident blocks"]
    assert [limit.shared // 1024 for limit in limits] == rows["KiB of shared memory"]
    assert [limit.shared_of_a_block // 1024 for limit in limits] == [
        *rows["KiB of shared memory of a block"]
    ]


@pytest.mark.parametrize(
    ("architecture", "threads", "registers", "shared", "blocks"),
    [
        (75, 256, 32, 0, 4),  # warps
        (80, 32, 16, 0, 32),  # blocks
        (86, 128, 168, 0, 3),  # registers
        (90, 128, 255, 0, 2),
        (80, 1024, 65, 0, 0),  # does not fit
        (86, 128, 32, 49 << 10, 2),  # shared memory, 1 KiB of it the system's
        (86, 128, 32, 50 << 10, 1),
        (75, 128, 32, 65 << 10, 0),
    ],
)
def test_resident_blocks(architecture, threads, registers, shared, blocks):
    assert resident_blocks(architecture, threads, registers, shared) == blocks
    warps = blocks * threads // 32
    assert occupancy(architecture, threads, registers, shared) == warps / LIMITS[architecture].warps


@pytest.mark.skipif(not shutil.which("nvcc"), reason="needs the CUDA toolkit's cuda_occupancy.h")
def test_nvidias_calculator(tmp_path):
    """The same blocks as cuda_occupancy.h finds, which has the rules and units of its own."""
    (tmp_path / "calculator.cpp").write_text(NVIDIAS)
    compiler = ["nvcc", "-w", "calculator.cpp", "-o", "calculator"]
    subprocess.run(compiler, cwd=tmp_path, check=True)
    asked, ours = [], []
    for architecture, threads, registers, shared in itertools.product(
        LIMITS, THREADS, range(16, 256, 7), SHARED
    ):
        limits = LIMITS[architecture]
        of_device = (limits.warps, limits.shared, limits.shared_of_a_block, limits.reserved)
        asked.append(
            f"{architecture} {threads} {registers} {shared} {' '.join(map(str, of_device))}"
        )
        ours.append(resident_blocks(architecture, threads, registers, shared))
    done = subprocess.run(
        [tmp_path / "calculator"],
        input="\n".join(asked),
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = [int(line) for line in done.stdout.split()]
    assert len(theirs) == len(ours) and max(ours) > 16
    assert [row for row in zip(asked, ours, theirs, strict=True) if row[1] != row[2]] == []


def test_rooflines():
    """By hand: 3.35 GB at 3,350 GB/s; 64 bytes a clock into one multiprocessor of 132."""
    h100 = CARDS[-1]
    large = Work("large", "", "", 10_000, 128, 3.35e9, 989e9, "f16", moved=64 * 132 * 1.83e9)
    times = microseconds(large, h100)
    assert times["memory"] == pytest.approx(1e6 * 1e-3)
    assert times["L2"] == pytest.approx(1e6)
    assert times["f16"] == pytest.approx(1e3, rel=1e-3)  # 989 TFLOP/s
    one = Work("one block", "", "", 1, 128, 64, 256)
    assert microseconds(one, h100)["L2"] == microseconds(one, h100)["fma"] == 1e-3 / 1.83


def test_cards_have_the_same_launches():
    launches = {card.architecture: works(card.architecture) for card in CARDS}
    names = [[work.name for work in found] for found in launches.values()]
    assert names[0] == names[1] == names[2] and len(set(names[0])) == len(names[0])
    assert all((SOURCES / f"{work.source}.cu").exists() for work in launches[90])


def test_without_nvcc(monkeypatch, capsys):
    """Nothing is written that could be taken for a table."""
    monkeypatch.setenv("PATH", "")
    with pytest.raises(SystemExit, match="there is no nvcc"):
        main([])
    assert capsys.readouterr().out == ""


def test_arguments_that_it_has_not(capsys):
    with pytest.raises(SystemExit):
        main(["rope"])
    assert "unrecognized arguments: rope" in capsys.readouterr().err


def test_what_ptxas_says():
    text = """ptxas info    : Compiling entry function '_Z1av' for 'sm_90'
ptxas info    : Function properties for _Z1av
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 0 barriers, 640 bytes cmem[0]
ptxas info    : Compiling entry function '_Z1bv' for 'sm_90'
ptxas info    : Used 128 registers, used 1 barriers, 4112 bytes smem, 640 bytes cmem[0]
"""
    assert USAGE.findall(text) == [("_Z1av", "40", ""), ("_Z1bv", "128", "4112")]
