"""The layer rules of docs/design.md, on include and import lines, and the size of files."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "python/mllama"
FILES = sorted(PACKAGE.rglob("*.py"))
MUST_NOT_NAME = {
    "csrc/kernels": r"torch/|ATen|c10|pybind11|core/|ops/",
    "csrc/simd": r"torch/|ATen|c10|pybind11|core/|ops/|kernels/|emulator/",
    "csrc/emulator": r"torch/|ATen|c10|pybind11|core/|ops/|kernels/",
    "csrc/ops": r"torch/|ATen|c10|pybind11",
    "csrc/decode": r"torch/|ATen|c10|pybind11|ops/",
    "python/mllama/ops": r"mllama\.(?!ops)|mllama import (?!_ext)",
    "python/mllama/config": r"mllama\.(?!config)|mllama import",
    "python/mllama/nn": r"mllama\.(?!ops|nn)|mllama import",
    "python/mllama/encoders": r"mllama\.(?!ops|nn|encoders|config)|mllama import",
    "python/mllama/fusion": r"mllama\.(?!ops|nn|fusion|config)|mllama import",
    "python/mllama/text": r"mllama\.(?!ops|nn|text|config)|mllama import",
    "python/mllama/model": r"mllama\.(?!ops|nn|encoders|fusion|text|config|model)"
    r"|from mllama import (?!_ext)",
    "python/mllama/weights": r"mllama\.(?!config|weights)|mllama import",
    "python/mllama/families": r"mllama\.(?!config|weights|families)|from mllama import",
    "python/mllama/checkpoints": r"mllama\.(?!ops|config|weights|families|checkpoints|device"
    r"|nn\.wrappers)|from mllama import",
    "python/mllama/processing": r"mllama\.(?!ops|processing|checkpoints\.gguf|families)"
    r"|from mllama import",
    "python/mllama/quant": r"mllama\.(?!ops|nn|quant)|from mllama import (?!_ext)",
    "python/mllama/runtime": r"mllama\.(hf|cli|api|dropin)|mllama import",
    "python/mllama/lora": r"mllama\.(hf|cli|api|dropin|model|runtime)|mllama import",
    "python/mllama/evaluate": r"mllama\.(cli|dropin)",
    "python/mllama/hf": r"mllama\.(cli|dropin)",
    "python/mllama/data": r"mllama\.(cli|dropin|api|train|evaluate|lora)|mllama import",
    "python/mllama/train": r"mllama\.(cli|dropin|plan)|^\s*(import|from) peft\b",
    "python/mllama/plan": r"mllama\.(cli|dropin)|^\s*(import|from) peft\b",
}
LONGEST_FILE, LONGEST_FUNCTION = 400, 80  # lines


def import_lines(path: Path) -> list[str]:
    lines = path.read_text().splitlines()
    return [line for line in lines if re.match(r"\s*(#include|import|from)\b", line)]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("place", MUST_NOT_NAME)
def test_layer(place):
    files = [
        path
        for path in (ROOT / place).rglob("*")
        if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py")
    ]
    lines = [(path, line) for path in files for line in import_lines(path)]
    wrong = [(name(path), line) for path, line in lines if re.search(MUST_NOT_NAME[place], line)]
    assert lines and wrong == []


def test_one_kernel_file_tells_devices_apart():
    files = [path for path in (ROOT / "csrc/kernels").rglob("*") if path.is_file()]
    apart = r"__CUDA|\basm\b|emulator"
    named = [name(path) for path in files if re.search(apart, path.read_text())]
    assert named == ["csrc/kernels/cuda/device.cuh"]


def test_one_room_for_transformers():
    wrong = [
        (name(path), line)
        for path in FILES
        if PACKAGE / "hf" not in path.parents
        for line in import_lines(path)
        if re.search(r"\btransformers\b", line)
    ]
    assert wrong == []


def test_nothing_uses_the_older_names():
    wrong = [
        name(path)
        for path in FILES
        if PACKAGE / "dropin" not in path.parents
        and any(re.search(r"\bdropin\b", line) for line in import_lines(path))
    ]
    assert wrong == []


def module_name(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


def imports() -> dict[str, set[str]]:
    """Module -> the package's modules that it imports, anywhere in the file."""
    modules = {module_name(path): path for path in FILES}
    found: dict[str, set[str]] = {}
    for module, path in modules.items():
        named = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mllama"):
                for alias in node.names:
                    inner = f"{node.module}.{alias.name}"
                    named.add(inner if inner in modules else node.module)
            elif isinstance(node, ast.Import):
                named |= {alias.name for alias in node.names}
        found[module] = (named & modules.keys()) - {module, "mllama"}
    return found


def test_no_circle_among_files():
    graph = imports()
    graph.pop("mllama")  # its lazy table names everything
    while leaves := [module for module, named in graph.items() if not named & graph.keys()]:
        for module in leaves:
            del graph[module]
    circular = {module: sorted(named & graph.keys()) for module, named in graph.items()}
    assert circular == {}


def test_files_and_functions_are_short():
    long_files, long_functions = [], []
    for path in FILES:
        text = path.read_text()
        if text.count("\n") > LONGEST_FILE:
            long_files.append((name(path), text.count("\n")))
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1 - _documentation(node)
                if lines > LONGEST_FUNCTION:
                    long_functions.append((name(path), node.name, lines))
    assert (long_files, long_functions) == ([], [])


def _documentation(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function's docstring."""
    if ast.get_docstring(node) is None:
        return 0
    return node.body[0].end_lineno - node.body[0].lineno + 1
