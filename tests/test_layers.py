"""The layer rules of docs/design.md, on include and import lines."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MUST_NOT_NAME = {
    "csrc/kernels": r"torch/|ATen|c10|pybind11|core/|ops/",
    "csrc/simd": r"torch/|ATen|c10|pybind11|core/|ops/|kernels/",
    "csrc/ops": r"torch/|ATen|c10|pybind11",
    "python/mllama/ops": r"mllama\.(?!ops)|mllama import (?!_ext)|transformers",
    "python/mllama/nn": r"mllama\.(?!ops|nn)|mllama import",
    "python/mllama/towers": r"mllama\.(?!ops|nn|towers|config)|mllama import",
    "python/mllama/fusion": r"mllama\.(?!ops|nn|fusion|config)|mllama import",
    "python/mllama/text": r"mllama\.(?!ops|nn|text|config|compat)|mllama import",
    "python/mllama/pictures.py": r"mllama\.(processing|cli|api)|safetensors|json",
    "python/mllama/processing": r"(?<!models\.)mllama\.(?!ops|processing|checkpoints\.gguf_tokenizer)|from mllama import",
    "python/mllama/families.py": r"mllama\.(?!config)|mllama import",
    "python/mllama/arguments.py": r"mllama\.(?!families)|mllama import",
    "python/mllama/built.py": r"mllama\.(?!families)|mllama import",
    "python/mllama/fusing.py": r"mllama\.(processing|cli|api)|safetensors|json",
    "python/mllama/modeling.py": r"mllama\.(processing|cli|api)|safetensors|json",
    "python/mllama/checkpoints": r"mllama\.(?!checkpoints|config|nn\.wrappers)|from mllama import",
    "python/mllama/lora": r"mllama\.(?!ops|nn|lora|checkpoints\.(files|sources|meta_source))|mllama import",
    "python/mllama/siglip.py": r"mllama\.(processing|cli|api)|safetensors|json",
}


@pytest.mark.parametrize("place", MUST_NOT_NAME)
def test_layer(place):
    files = [
        path
        for path in (ROOT / place, *(ROOT / place).rglob("*"))
        if path.suffix in (".h", ".cpp", ".cu", ".cuh", ".py")
    ]
    lines = [
        (path, line)
        for path in files
        for line in path.read_text().splitlines()
        if re.match(r"\s*(#include|import|from)\b", line)
    ]
    assert (
        lines
        and [
            f"{path.relative_to(ROOT)}: {line}"
            for path, line in lines
            if re.search(MUST_NOT_NAME[place], line)
        ]
        == []
    )


def test_nothing_uses_the_older_names():
    package = ROOT / "python/mllama"
    files = [path for path in package.rglob("*.py") if package / "dropin" not in path.parents]
    assert (
        files
        and [
            path
            for path in files
            if re.search(r"^\s*(import|from) .*\bdropin\b", path.read_text(), re.MULTILINE)
        ]
        == []
    )
