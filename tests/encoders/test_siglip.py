"""The SigLIP encoder against transformers'."""

import pytest
import torch
from transformers import SiglipVisionModel

import tiny
from mllama.encoders.siglip import SiglipImageEncoder
from mllama.hf.configs import MllamaVisionConfig


@pytest.mark.parametrize("size", [{}, {"image_size": 24}, {"image_size": 19}, {"num_channels": 1}])
def test_features_equal_transformers(size):
    config = MllamaVisionConfig(**tiny.VISION | size)
    ours = tiny.randomize(SiglipImageEncoder(config))
    theirs = SiglipVisionModel(config).eval()
    theirs.load_state_dict(ours.state_dict())
    pixels = torch.randn(2, config.num_channels, config.image_size, config.image_size)
    with torch.no_grad():
        got, expected = (
            ours(pixels, output_hidden_states=True),
            theirs(pixels, output_hidden_states=True),
        )
        torch.testing.assert_close(
            got.last_hidden_state, expected.last_hidden_state, rtol=1e-4, atol=1e-4
        )
        for state, reference in zip(got.hidden_states, expected.hidden_states, strict=True):
            torch.testing.assert_close(state, reference, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            ours(pixels, final_norm=False).last_hidden_state, got.hidden_states[-1]
        )


def test_probabilities_are_dropped_in_training_as_in_transformers():
    config = MllamaVisionConfig(**tiny.VISION, attention_dropout=0.4, attn_implementation="eager")
    ours = tiny.randomize(SiglipImageEncoder(config))
    theirs = SiglipVisionModel(config)
    theirs.load_state_dict(ours.state_dict())
    pixels, features = tiny.images(2), []
    for encoder in (ours.train(), theirs.train()):
        torch.manual_seed(3)
        features.append(encoder(pixels).last_hidden_state)
    torch.testing.assert_close(*features, rtol=1e-4, atol=1e-4)
    assert (features[0] - ours.eval()(pixels).last_hidden_state).abs().max() > 0.1


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan"), "0.1"])
def test_chances_that_cannot_be(dropout):
    with pytest.raises(ValueError, match="attention_dropout"):
        MllamaVisionConfig(attention_dropout=dropout)


def test_pixels_are_cast_to_the_encoders_dtype():
    encoder = tiny.randomize(SiglipImageEncoder(MllamaVisionConfig(**tiny.VISION))).to(
        torch.bfloat16
    )
    assert encoder(tiny.images(1)).last_hidden_state.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("error", "pixels"),
    [
        (ValueError, torch.zeros(1, 1, 16, 16)),
        (ValueError, torch.zeros(1, 3, 8, 16)),
        (ValueError, torch.zeros(3, 16, 16)),
        (TypeError, torch.zeros(1, 3, 16, 16, dtype=torch.uint8)),
        (TypeError, [[0.0]]),
    ],
)
def test_other_pixels_are_refused(error, pixels):
    with pytest.raises(error, match="pixel_values must be"):
        SiglipImageEncoder(MllamaVisionConfig(**tiny.VISION))(pixels)
