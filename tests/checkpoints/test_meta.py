"""Meta's own folders: tensors and logits equal to Meta's reference code, from one file and from parallel shards; hostile folders."""

import json

import pytest
import torch

import meta_reference
from mllama import MllamaForConditionalGeneration
from twins import randomise

PARAMS = {
    "grouped": {
        "dim": 64,
        "n_layers": 3,
        "n_heads": 4,
        "n_kv_heads": 2,
        "vocab_size": 520,
        "ffn_dim_multiplier": 1.3,
        "multiple_of": 32,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
    "all heads": {"dim": 48, "n_layers": 2, "n_heads": 2, "vocab_size": 96, "norm_eps": 1e-6, "rope_theta": 10000.0, "multiple_of": 16},
    "more layers": {
        "dim": 96,
        "n_layers": 5,
        "n_heads": 6,
        "n_kv_heads": 2,
        "vocab_size": 640,
        "ffn_dim_multiplier": 1.0,
        "norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "use_scaled_rope": True,
    },
}


def text_reference(params: dict) -> torch.nn.Module:
    code = meta_reference.load("model")
    return randomise(code.Transformer(code.ModelArgs(**params, max_seq_len=16, max_batch_size=2))).eval()


def write(folder, model: torch.nn.Module, params: dict, count: int = 1):
    folder.mkdir(exist_ok=True)
    (folder / "params.json").write_text(json.dumps(params))
    for number, part in enumerate(meta_reference.shards(model, count)):
        torch.save(part, folder / f"consolidated.{number:02d}.pth")
    return folder


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_text_logits_equal_metas(tmp_path, params, count):
    reference = text_reference(params)
    model = MllamaForConditionalGeneration.from_pretrained(write(tmp_path / "meta", reference, params, count))
    tokens = torch.randint(0, params["vocab_size"], (2, 12))
    with torch.no_grad():
        assert close(model(input_ids=tokens).logits, reference(tokens, 0))
    assert model.dtype == torch.float32 and model.config.model_type == "llama"
