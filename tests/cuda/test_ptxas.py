"""What ptxas makes of the kernels: registers, and none of them in memory. Nothing is run."""

import re
import shutil
import subprocess

import pytest

import devices
import emulated

# Of all threads' 65,536; with 128 threads in a block, 128 each leave room for four blocks.
MOST_REGISTERS = 80
BUILDS = {75: ("sm_75",), 80: ("sm_80", "sm_86", "sm_90")}
pytestmark = pytest.mark.skipif(not devices.is_compiled(), reason="needs --device=ptx")


@pytest.mark.parametrize("operator", emulated.operators() if devices.is_compiled() else [])
@pytest.mark.parametrize("device", BUILDS.get(emulated.architecture(), ()))
def test_registers(operator, device, tmp_path):
    ptx = emulated.FOLDER / f"ptx/{operator}_{emulated.architecture()}.ptx"
    command = [shutil.which("nvcc"), f"-arch={device}", "-Xptxas=-v", "-cubin", ptx]
    done = subprocess.run(
        [*command, "-o", tmp_path / "kernels"], capture_output=True, text=True, check=True
    )
    kernels = done.stderr.count("Compiling entry function")
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    assert len(registers) == kernels > 0
    assert max(registers) <= MOST_REGISTERS
    no_spills = "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads"
    assert done.stderr.count(no_spills) == kernels
