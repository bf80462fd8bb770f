"""The code of docs/fusion.md runs."""

import re
from pathlib import Path

import torch
from transformers import LlamaConfig, SiglipVisionConfig

import tiny
from mllama import MllamaForConditionalGeneration, SiglipModel

PAGE = Path(__file__).parents[2] / "docs" / "fusion.md"


def test_the_recipes_run(monkeypatch, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    sizes = {"num_hidden_layers": 4, "vocab_size": len(tokenizer), "max_position_embeddings": 512}
    llama = MllamaForConditionalGeneration(LlamaConfig(**tiny.TEXT | sizes))
    tiny.randomize(llama).save_pretrained(tmp_path / "llama")
    tokenizer.save_pretrained(tmp_path / "llama")
    siglip = SiglipModel(SiglipVisionConfig(**tiny.VISION))
    tiny.randomize(siglip).save_pretrained(tmp_path / "siglip")
    monkeypatch.chdir(tmp_path)

    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)
    names = {}
    exec(compile("\n".join(blocks), PAGE.name, "exec"), names)
    assert names["answer"].shape == (1, 13)

    saved = MllamaForConditionalGeneration.from_pretrained("fused")
    ids, pixels = names["ids"], names["pixels"]
    with torch.no_grad():
        assert torch.equal(saved(ids, pixels).logits, names["fused"](ids, pixels).logits)
        assert not torch.equal(saved(ids, pixels).logits, names["llama"](ids).logits)
