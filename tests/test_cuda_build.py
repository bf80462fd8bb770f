"""The module with CUDA kernels, as it is without a GPU: the machine code, what it links, and that
one file serves CPU and CUDA builds of torch. `make test-cuda-build` builds it into build/cuda.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import machine_code
from compiled_module import python, replaced

ROOT = Path(__file__).parent.parent
MODULE = next((ROOT / "build/cuda").glob("_C.*.so"), None)
ARCHITECTURES = {75, 80, 86, 90}
pytestmark = pytest.mark.skipif(
    MODULE is None, reason="no module in build/cuda: `make test-cuda-build`, which needs nvcc"
)

# ---- machine code

# The most registers of a thread, on sm_75 and on later ones; the first row that fits counts. Of a
# multiprocessor's 65,536, three blocks of 128 threads have 168 for each thread, two have 255.
REGISTERS = [
    (r"attention<.*Tiles<\w+, (64|80),", 216, 168),
    (r"attention<.*Tiles<\w+, 128,.*QuantizedKeyRows", 232, 192),  # blocks of 64 threads
    (r"attention<.*Tiles<\w+, 128,", 232, 176),
    (r"attention<.*Tiles<\w+, 256,", 255, 255),
    (r"attention_query_gradient<.*Tiles<\w+, (64|80),", 208, 168),
    ("attention_(key_gradients|query_gradient)<", 255, 255),
    ("multiply_many<", 8, 168),
    ("multiply_few<", 80, 80),
    ("", 72, 64),
]
# Instructions that a kernel must have, by its name; on sm_75 tensor cores take f16 alone, products
# of codes are dot products, and nothing is copied asynchronously.
MMA_OF_TURING, MMA = r"attention.*TensorTiles<.*, true>", r"attention.*TensorTiles<.*, false>"
INSTRUCTIONS = [
    (75, MMA_OF_TURING, {"HMMA", "LDSM"}),
    (80, MMA, {"HMMA", "LDSM", "LDGSTS"}),
    (80, r"attention.*FloatTiles<.*, false>", {"FFMA", "LDGSTS"}),
    (75, r"attention.*FloatTiles<.*, true>", {"FFMA"}),
    (75, "multiply_few<CodeHalf", {"IDP"}),
    (80, "multiply_few<CodeHalf", {"IDP"}),
    (80, "multiply_many<CodeSteps", {"IMMA", "LDGSTS"}),
    (80, "multiply_many<FloatSteps", {"HMMA", "LDGSTS"}),
]


@pytest.fixture(scope="module")
def kernels() -> list[machine_code.Kernel]:
    if machine_code.cuobjdump() is None:
        pytest.skip("no cuobjdump: of a CUDA toolkit, or PyPI's nvidia-cuda-cuobjdump")
    return machine_code.kernels(MODULE)


def test_every_architecture_has_every_kernel(kernels):
    names = {kernel.name for kernel in kernels}
    assert {(kernel.architecture, kernel.name) for kernel in kernels} == {
        (architecture, name) for architecture in ARCHITECTURES for name in names
    }


def test_nothing_is_spilled(kernels):
    """Threads have no memory of their own, where registers would be spilled."""
    spilled = [
        f"{kernel}: {kernel.local_bytes} bytes"
        for kernel in kernels
        if kernel.local_bytes or {"LDL", "STL"} & kernel.instructions.keys()
    ]
    assert not spilled, "\n".join(spilled)


def test_registers(kernels):
    over = []
    for kernel in kernels:
        _, turing, later = next(row for row in REGISTERS if re.match(row[0], kernel.name))
        most = turing if kernel.architecture < 80 else later
        if kernel.registers > most:
            over.append(f"{kernel}: {kernel.registers} registers, more than {most}")
    assert not over, "\n".join(over)


@pytest.mark.parametrize(("first", "name", "wanted"), INSTRUCTIONS)
def test_instructions(kernels, first, name, wanted):
    """Of one generation: sm_75, or all from sm_80 on."""
    chosen = [
        kernel
        for kernel in kernels
        if re.match(name, kernel.name) and (kernel.architecture < 80) == (first < 80)
    ]
    assert chosen
    for kernel in chosen:
        assert wanted <= kernel.instructions.keys(), f"{kernel} lacks {wanted}"


# ---- the file

LIBRARIES = {"torch", "torch_cpu", "c10", "stdc++", "gcc_s", "m", "c", "pthread", "dl", "rt"}


def tool(*command: str) -> str:
    return subprocess.run([*command, MODULE], capture_output=True, text=True, check=True).stdout


def test_it_needs_no_library_of_cuda():
    """The CUDA runtime is linked statically, so that CPU builds of torch can load the module."""
    dynamic = tool("readelf", "-dW")
    needed = re.findall(r"NEEDED.*\[(?:lib)?(.*?)\.so", dynamic)
    assert set(needed) - {"ld-linux-x86-64"} <= LIBRARIES
    assert re.search(r"FLAGS.*\bNOW\b", dynamic)
    undefined = tool("nm", "-D", "--undefined-only").split("\n")
    assert not [line for line in undefined if re.search(r" U (cuda|cu[A-Z]|__cuda)", line)]
    assert any(line.split() == ["w", "aoti_torch_get_current_cuda_stream"] for line in undefined)


# ---- imports

FAKE_TENSORS = ROOT / "tests/ops/test_fake_tensors.py"
PYTHONS = {"this": Path(sys.executable), "CUDA": ROOT / ".venv-cuda/bin/python"}
USES = """
import io, contextlib, json
import torch, mllama
from mllama import _ext, cli, ops
from mllama.device import choose_device
from mllama.ops.attention import reference as attention
from mllama.ops.packed_linear import reference as packed_linear
from mllama.ops.rms_norm import reference as rms_norm

module = _ext.load()
assert module.__file__ == FILE
said = io.StringIO()
with contextlib.redirect_stdout(said):
    cli.main(["info", "--json"])
info = json.loads(said.getvalue())
try:
    refused = choose_device("cuda")
except ValueError as error:
    refused = str(error)
x, weight, q = torch.randn(3, 64), torch.randn(64), torch.randn(1, 5, 2, 64)
packed = ops.pack_weight(torch.randn(32, 64), "int8")
same = [
    torch.allclose(ops.rms_norm(x, weight), rms_norm(x, weight), atol=1e-5),
    torch.allclose(ops.attention(q, q, q), attention(q, q, q), atol=1e-5),
    torch.allclose(
        ops.packed_linear(x, packed, out_features=32, packing="int8"),
        packed_linear(x, packed, out_features=32, packing="int8"),
        atol=1e-3,
    ),
]
print(json.dumps({"info": info, "refused": refused, "same": same, "cuda": torch.version.cuda,
                  "operators": module.build_info()["cuda_operators"].split()}))
"""


@pytest.fixture(params=PYTHONS)
def interpreter(request) -> str:
    path = PYTHONS[request.param]
    if not path.exists():
        pytest.skip(f"no {path.relative_to(ROOT)}: `make test-cuda-build`")
    return str(path)


def run(interpreter: str, code: str) -> str:
    paths = f"{ROOT / 'python'}:{ROOT / 'tests'}"
    done = python(
        replaced(str(MODULE)) + code, interpreter, PYTHONPATH=paths, CUDA_VISIBLE_DEVICES=""
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_import_and_use_on_the_cpu(interpreter):
    found = json.loads(run(interpreter, USES).splitlines()[-1])
    assert all(found["same"])
    assert "CUDA 13" in found["info"]["built with"]
    assert {"attention", "packed_linear"} <= set(found["operators"])
    no_device = "not available" if found["cuda"] is None else "in torch, no device"
    assert no_device in found["info"]["cuda"]
    assert "device 'cuda' is not known or not here" in found["refused"]


def test_operators_on_devices_that_are_not_there(interpreter):
    """tests/ops/test_fake_tensors.py, where a CUDA build of torch runs all of it."""
    said = run(
        interpreter,
        f"""
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", {str(FAKE_TENSORS)!r}]))
""",
    )
    is_cpu_build = "None" in python("import torch; print(torch.version.cuda)", interpreter).stdout
    assert " passed" in said and ("skipped" in said) == is_cpu_build
