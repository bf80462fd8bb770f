"""docs/fusion.md runs as it stands."""

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, SiglipVisionConfig

import twins
from mllama import MllamaForConditionalGeneration, SiglipModel

PAGE = Path(__file__).parents[2] / "docs" / "fusion.md"


def test_the_recipes_run(monkeypatch, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        **twins.TEXT
        | {"num_hidden_layers": 4, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    )
    twins.randomise(MllamaForConditionalGeneration(config)).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    twins.randomise(SiglipModel(SiglipVisionConfig(**twins.VISION))).save_pretrained(
        tmp_path / "siglip"
    )
    monkeypatch.chdir(tmp_path)
    code, names = (
        "\n".join(re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)),
        {},
    )
    exec(compile(code, PAGE.name, "exec"), names)
    assert names["answer"].shape == (1, 13)
    read, ids, pixels = (
        MllamaForConditionalGeneration.from_pretrained("seeing"),
        names["ids"],
        names["pixels"],
    )
    with torch.no_grad():
        assert torch.equal(read(ids, pixels).logits, names["seeing"](ids, pixels).logits)
        assert not torch.equal(read(ids, pixels).logits, names["llama"](ids).logits)
