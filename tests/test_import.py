"""What happens before there is a model: lazy imports, and a compiled module that is missing,
broken, stale or wrongly asked.
"""

import json
import os
import re
import subprocess
import sys

import pytest
import torch

import helpers
import mllama
from mllama import _ext
from mllama.ops import _dispatch

HEAVY = ("torch", "transformers", "numpy", "PIL", "safetensors")


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in another Python, with kernels unless `env` says otherwise."""
    environment = os.environ | {"MLLAMA_DISABLE_OPS": "", "MLLAMA_CPU_ISA": ""} | env
    return subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}"],
        env=environment,
        capture_output=True,
        text=True,
    )


def compiled_module(file: str | None) -> str:
    """Code that puts a file in the place of the compiled module; None: there is none."""
    return f"""
import importlib.util

FILE = {file!r}

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mllama._C":
            if FILE is None:
                raise ModuleNotFoundError("No module named 'mllama._C'", name=name)
            return importlib.util.spec_from_file_location(name, FILE)

sys.meta_path.insert(0, Finder())
"""


def test_the_package_and_the_help_import_nothing_heavy():
    run = python(f"""
import mllama
mllama.__version__, dir(mllama)
from mllama.cli import main
for arguments in (["--help"], ["ask", "--help"], ["--version"], ["ask", "--top-k", "x"]):
    try:
        main(arguments)
    except SystemExit:
        pass
print(*(name for name in {HEAVY} if name in sys.modules))
""")
    assert run.returncode == 0 and run.stdout.splitlines()[-1] == "", run.stdout + run.stderr


def test_public_names_exist_and_others_are_refused():
    assert all(getattr(mllama, name) is not None for name in mllama.__all__)
    with pytest.raises(AttributeError, match="no attribute 'loads'; its public names are .*load"):
        mllama.loads  # noqa: B018


@pytest.mark.parametrize("kind", ["missing", "broken"])
def test_without_the_compiled_module_there_is_one_error_with_its_cure(kind, tmp_path):
    file = tmp_path / "_C.so"
    file.write_bytes(b"not a library")
    cause = (
        "the compiled module mllama._C is not there"
        if kind == "missing"
        else f"mllama._C cannot be loaded: {file}"
    )
    run = python(
        compiled_module(None if kind == "missing" else str(file))
        + """
import json
from mllama import cli
from mllama._ext import OpsUnavailable

said = []
for name in ("ops", "load"):
    try:
        getattr(__import__("mllama"), name)
    except OpsUnavailable as error:
        said.append(str(error))
print(json.dumps(said))
sys.stdout.flush()
cli.main(["info"])  # describes a broken installation too
sys.exit(cli.main(["ask", "picture.png", "How many?"]))
"""
    )
    said, *info = run.stdout.splitlines()
    import_ops, import_load = json.loads(said)
    assert import_ops == import_load and import_ops.startswith(cause)
    assert "pip install" in import_ops and "MLLAMA_DISABLE_OPS=1" in import_ops
    assert any(cause in line for line in info)
    assert (run.returncode, run.stderr) == (2, f"mllama: error: {import_ops}\n")


def test_references_need_no_compiled_module():
    run = python(
        compiled_module(None)
        + "import torch, mllama\nprint(mllama.ops.swiglu(torch.ones(1), torch.ones(1)).item())",
        MLLAMA_DISABLE_OPS="1",
    )
    assert run.returncode == 0 and run.stdout.startswith("0.731"), run.stderr


def test_disable_ops_takes_0_and_1(monkeypatch):
    monkeypatch.setenv("MLLAMA_DISABLE_OPS", "yes")
    with pytest.raises(ValueError, match="MLLAMA_DISABLE_OPS must be 0 or 1, got 'yes'"):
        _ext.disabled()


@helpers.needs_kernels
def test_an_unknown_instruction_set_is_one_value_error():
    code = """
try:
    import mllama.ops
except ValueError as error:
    print(error)
from mllama.cli import main
sys.exit(main(["ask", "picture.png", "How many?"]))
"""
    run = python(code, MLLAMA_CPU_ISA="avx9")
    assert re.fullmatch("MLLAMA_CPU_ISA: .* got 'avx9'\n", run.stdout)
    assert (run.returncode, run.stderr) == (2, f"mllama: error: {run.stdout}")


@helpers.needs_kernels
def test_a_module_of_older_sources_is_told():
    with pytest.raises(
        _ext.OpsUnavailable,
        match="built from other sources .* lacks the operator rms_norm_of_tomorrow.*pip install",
    ):
        _dispatch.register("rms_norm_of_tomorrow", fake=torch.empty_like)
