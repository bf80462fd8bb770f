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
    "python/mllama/nn": r"mllama\.(?!ops|nn)|mllama import|transformers",
    "python/mllama/config": r"mllama\.(?!config)|mllama import|torch|transformers|huggingface",
    "python/mllama/encoders": r"mllama\.(?!ops|nn|encoders|config)|mllama import",
    "python/mllama/fusion": r"mllama\.(?!ops|nn|fusion|config)|mllama import|transformers",
    "python/mllama/text": r"mllama\.(?!ops|nn|text|config)|mllama import|transformers",
    "python/mllama/processing": r"(?<!models\.)mllama\.(?!ops|processing|checkpoints\.gguf)"
    r"|from mllama import",
    "python/mllama/weights": r"mllama\.(?!config|weights)|mllama import|transformers|huggingface",
    "python/mllama/families": r"mllama\.(?!config|families|weights)|from mllama import"
    r"|transformers|huggingface",
    # gguf/tokenizer.py makes transformers' tokenizers.
    "python/mllama/checkpoints": r"mllama\.(?!checkpoints|config|families|weights|device)"
    r"|from mllama import"
    r"|transformers(?! import PreTrainedTokenizerBase|\.tokenization_utils_base import gen)",
    "python/mllama/lora": r"mllama\.(?!ops|nn|lora|checkpoints\.(files|sources|meta\.source))"
    r"|mllama import",
    "python/mllama/hf": r"mllama\.cli",
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
