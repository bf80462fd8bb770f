"""What type checkers know of the package: the signature of every public name, in spite of lazy
loading, and which calls are wrong.

mypy comes with `make lint`, which checks the same files in the same way, so that its cache serves
both. pyright is checked where it is.
"""

import ast
import importlib.resources
import inspect
import json
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest

import mllama
import test_readme
from mllama import ops

ROOT = Path(__file__).parent.parent
IN_USE = ROOT / "tests/types_in_use.py"
PUBLIC = {f"mllama.{name}": getattr(mllama, name) for name in mllama.__all__} | {
    f"mllama.ops.{name}": getattr(ops, name) for name in ops.__all__
}
# of torch: backward is not annotated, and x.grad may be None
TORCH_S_OWN = '# mypy: disable-error-code="no-untyped-call,union-attr"'
# Of a class mypy reveals the constructor, pyright only the name.
FUNCTIONS = {name: value for name, value in PUBLIC.items() if callable(value)}


def revealing(names: list[str]) -> str:
    return "\n".join(
        ["import mllama", "import mllama.ops", *(f"reveal_type({name})" for name in names)]
    )


def check_revealed(said: list[str], functions: dict[str, Callable]) -> None:
    """One line for each function, with the name of every parameter that it takes when it runs."""
    assert len(said) == len(functions)
    for line, (name, function) in zip(said, functions.items(), strict=True):
        parameters = [p for p in inspect.signature(function).parameters if p != "self"]
        assert all(re.search(rf"\b{parameter}: ", line) for parameter in parameters), (
            f"{name}: {line}"
        )


def test_the_package_says_that_it_is_typed():
    assert importlib.resources.files("mllama").joinpath("py.typed").is_file()


def test_names_for_type_checkers_are_those_that_are_loaded():
    tree = ast.parse(Path(mllama.__file__).read_text())
    blocks = [
        node.body
        for node in tree.body
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
    ]
    imports = [node for body in blocks for node in body if isinstance(node, ast.ImportFrom)]
    declared = {
        name.asname: f"{node.module}.{name.name}" for node in imports for name in node.names
    }
    loaded = {name: f"mllama.{home}.{name}" for name, home in mllama._HOME.items()}
    assert declared == loaded | {"ops": "mllama.ops"}


@pytest.mark.skipif(
    find_spec("mypy") is None, reason="mypy is not installed: make lint installs it"
)
def test_mypy_sees_signatures_wrong_calls_and_the_readme(tmp_path):
    """Seconds where mypy has its cache, half a minute where not."""
    revealed, readme = tmp_path / "revealed.py", tmp_path / "readme.py"
    revealed.write_text(revealing(list(FUNCTIONS)))
    readme.write_text("\n".join([TORCH_S_OWN, *test_readme.blocks("python")]))
    checked = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["mypy"]["files"]
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--no-pretty",
        "--no-error-summary",
        *checked,
        str(revealed),
        str(readme),
    ]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    said = re.findall(
        r'^.*revealed\.py:\d+: note: Revealed type is "(.*)"$', run.stdout, re.MULTILINE
    )
    assert [
        line for line in run.stdout.splitlines() if "Revealed type is" not in line
    ] == [] and run.stderr == ""
    check_revealed(said, FUNCTIONS)


@pytest.mark.skipif(
    shutil.which("pyright", path=str(Path(sys.executable).parent)) is None,
    reason="pyright is not installed",
)
def test_pyright_sees_signatures_and_wrong_calls(tmp_path):
    """Twenty seconds, for those who have installed it: the project does not."""
    functions = {name: value for name, value in FUNCTIONS.items() if not inspect.isclass(value)}
    (tmp_path / "revealed.py").write_text(revealing(list(functions)))
    shutil.copy(IN_USE, tmp_path)
    settings = {"extraPaths": [str(ROOT / "python")], "reportUnnecessaryTypeIgnoreComment": True}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(settings))
    command = [
        Path(sys.executable).parent / "pyright",
        "--outputjson",
        "--pythonpath",
        sys.executable,
        "--project",
        tmp_path,
    ]
    found = json.loads(subprocess.run(command, capture_output=True, text=True).stdout)[
        "generalDiagnostics"
    ]
    errors = [line["message"] for line in found if line["severity"] != "information"]
    assert errors == []
    check_revealed(
        [line["message"] for line in found if Path(line["file"]).name == "revealed.py"], functions
    )
