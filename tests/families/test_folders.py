"""Folders of every family: stock transformers' are read, ours are read by stock, and nothing is
lost on either way.
"""

import json

import pytest
import torch
from safetensors.torch import load_file

from tiny.pairs import ONE_EACH, PAIRED, make, pair


def result(both, model) -> torch.Tensor:
    """Logits, or of an encoder alone its features."""
    with torch.no_grad():
        if model.main_input_name == "pixel_values":
            return model(both.images(2)).last_hidden_state
        return model(**both.inputs("two images", completion=2)).logits


@pytest.mark.parametrize("case", PAIRED)
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


@pytest.mark.parametrize("case", [*ONE_EACH, "siglip_vision_model", "llava, siglip, -1"])
def test_a_state_dict_with_the_files_names(case, tmp_path):
    both, fresh = pair(case), make(case, seed=1).ours
    both.theirs.save_pretrained(tmp_path)
    for names in (
        load_file(tmp_path / "model.safetensors"),
        both.theirs.state_dict(),
        both.ours.state_dict(),
    ):
        fresh = make(case, seed=1).ours
        report = fresh.load_state_dict(names)
        assert not report.missing_keys and not report.unexpected_keys
        assert torch.equal(result(both, fresh), result(both, both.ours))
    assert fresh.load_state_dict(
        {"nobody.weight": torch.zeros(1)}, strict=False
    ).unexpected_keys == ["nobody.weight"]


def test_older_and_newer_spelling_of_rotary_scaling(tmp_path):
    both = pair("llama, factor 8")
    both.theirs.save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    rope = content.pop("rope_parameters")
    for spelling in (
        {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope},
        {"rope_parameters": rope | {"rope_theta": 500.0}},
    ):
        (tmp_path / "config.json").write_text(json.dumps(content | spelling))
        assert torch.equal(
            result(both, type(both.ours).from_pretrained(tmp_path)), result(both, both.ours)
        )


@pytest.mark.parametrize(
    "case", ["gemma", "llama, factor 32, tied, older spelling", "llava, siglip, -1", "paligemma"]
)
def test_what_transformers_class_without_a_head_writes(case, tmp_path):
    both = pair(case)
    both.theirs.model.save_pretrained(tmp_path)
    read = type(both.ours).from_pretrained(tmp_path)
    assert torch.equal(result(both, read), result(both, both.ours))
