"""compose: what no family's tests show, since no stock model has it."""

import pytest
from transformers import LlamaConfig, MllamaConfig

import twins
from mllama.families.compose import compose


def test_cross_attention_layers_belong_to_llama_vision_alone():
    assert (
        compose(LlamaConfig(**twins.TEXT, cross_attention_layers=[1])).text.cross_attention_layers
        == ()
    )
    with pytest.raises(
        ValueError,
        match=r"cross_attention_layers must be None here: cross_attention_every places them; got \[1\]",
    ):
        compose(twins.config(text={"cross_attention_layers": [1]}))
    with pytest.raises(ValueError, match="cross_attention_layers must not begin with layer 0"):
        compose(MllamaConfig(text_config={"cross_attention_layers": [0, 5]}))


def test_heads_that_the_attention_operator_does_not_take():
    with pytest.raises(ValueError, match="hidden_size / attention_heads must be 1 to 256, got 320"):
        compose(MllamaConfig(vision_config={"attention_heads": 4}))
