"""Rotary tables against transformers', and their independence of the model's dtype and device."""

import pytest
import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from mllama.nn.rope import RotaryEmbedding
from tiny import LLAMA3


@pytest.mark.parametrize(
    "parameters",
    [{"rope_type": "default"}, {"rope_type": "linear", "factor": 4.0}, LLAMA3],
    ids=["default", "linear", "llama3"],
)
def test_tables_equal_transformers(parameters):
    parameters = parameters | {"rope_theta": 10000.0}
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, rope_parameters=dict(parameters))
    positions = torch.arange(200).unsqueeze(0)
    cos, sin = LlamaRotaryEmbedding(config)(
        torch.zeros(1), positions
    )  # both halves of a head, equal
    ours = RotaryEmbedding(32, parameters)(positions)
    torch.testing.assert_close(ours, (cos[..., :16], sin[..., :16]), rtol=1e-5, atol=1e-5)


def test_frequencies_stay_float32_and_real():
    with torch.device("meta"):
        rotary = RotaryEmbedding(16, {"rope_type": "default", "rope_theta": 10000.0})
    kept = rotary.frequencies.clone()
    rotary.to(torch.bfloat16)
    rotary.to_empty(device="meta")
    assert rotary.frequencies.device.type == "cpu" and torch.equal(rotary.frequencies, kept)
    assert not rotary.state_dict()
