"""Projectors: which one a config asks for, what it computes, and that files keep it."""

import json

import pytest
import torch
from torch.nn.functional import linear

import tiny
from mllama import MllamaForConditionalGeneration
from mllama.model.memory import count_parameters

IMAGE = [tiny.IMAGE] * tiny.PATCHES


@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_projector_is_one_layer_from_width_to_width(bias):
    model = tiny.model(projector="linear", multimodal_projector_bias=bias)
    weights = {
        name.removeprefix("multi_modal_projector."): value
        for name, value in model.named_parameters()
        if "projector" in name
    }
    assert list(weights) == (["linear.weight", "linear.bias"] if bias else ["linear.weight"])
    assert weights["linear.weight"].shape == (64, 32) and model.spec.projector == "linear"
    assert count_parameters(model)["projector"] == 64 * 32 + 64 * bias
    with torch.no_grad():
        features = model.vision_tower(tiny.images(2), final_norm=False).last_hidden_state
        expected = linear(features, weights["linear.weight"], weights.get("linear.bias"))
        torch.testing.assert_close(model.get_image_features(tiny.images(2)), expected)


@pytest.mark.parametrize("feature", ["last", "pre_norm"])
def test_files_keep_a_linear_projector(feature, tmp_path):
    model = tiny.model(projector="linear", vision_feature=feature)
    model.save_pretrained(tmp_path)
    assert (
        json.loads((tmp_path / "config.json").read_text())["model_type"] == "siglip_llama"
    )  # a LLaVA's has two layers
    read = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    inputs = tiny.batch(IMAGE + tiny.tokens(5)) | {"pixel_values": tiny.images(1)}
    with torch.no_grad():
        assert torch.equal(read(**inputs).logits, model(**inputs).logits)


def test_projectors_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="projector.*conv"):
        tiny.config(projector="conv")
    with pytest.raises(ValueError, match="projection_dim.*40"):
        tiny.config(projector="linear", projection_dim=40)
    assert tiny.config(projector="linear", projection_dim=64).projection_dim == 64
