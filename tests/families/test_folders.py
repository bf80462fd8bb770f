"""Folders of every family: stock transformers' are read, ours are read by stock, and nothing is
lost on either way.
"""

import json

import pytest
import torch

from tiny.pairs import ONE_EACH, make, pair

KINDS = [
    *ONE_EACH,
    "llama, factor 32, tied, older spelling",
    "llama, odd sizes, biases",
    "llava, siglip, -1",
    "siglip_vision_model",
    "siglip_vision_model, headless",
]


def result(both, model) -> torch.Tensor:
    """Logits, or of an encoder alone its features."""
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(both.images(2)).last_hidden_state
        return model(**both.inputs("two images", completion=2)).logits


@pytest.mark.parametrize("case", KINDS)
def test_there_and_back(case, tmp_path):
    both = pair(case)
    both.theirs.save_pretrained(tmp_path / "stock")
    read = type(both.ours).from_pretrained(tmp_path / "stock")
    assert type(read.config) is type(both.theirs.config) and not read.training
    assert torch.equal(result(both, read), result(both, both.ours))

    read.save_pretrained(tmp_path / "ours", max_shard_size="50KB")
    assert json.loads((tmp_path / "ours" / "config.json").read_text())["architectures"] == [
        type(both.theirs).__name__
    ]
    again, report = type(both.theirs).from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(result(both, again), result(both, both.theirs))
    assert torch.equal(
        result(both, type(read).from_pretrained(tmp_path / "ours")), result(both, read)
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [*ONE_EACH, "siglip_vision_model"])
def test_sixteen_bits_there_and_back(case, dtype, tmp_path):
    both = make(case)
    both.theirs.to(dtype).save_pretrained(tmp_path / "stock")
    read = type(both.ours).from_pretrained(tmp_path / "stock")
    assert read.dtype == dtype and torch.equal(
        result(both, read), result(both, both.ours.to(dtype))
    )
    read.save_pretrained(tmp_path / "ours")
    again = type(both.theirs).from_pretrained(tmp_path / "ours")
    assert again.dtype == dtype
    for name, value in again.state_dict().items():
        assert torch.equal(value, both.theirs.state_dict()[name]), name


@pytest.mark.parametrize(
    "case", ["gemma", "llama, factor 32, tied, older spelling", "llava, siglip, -1", "paligemma"]
)
def test_what_transformers_class_without_a_head_writes(case, tmp_path):
    both = pair(case)
    both.theirs.model.save_pretrained(tmp_path)
    read = type(both.ours).from_pretrained(tmp_path)
    assert torch.equal(result(both, read), result(both, both.ours))
