"""compose: what no family's tests show, since no stock model has it."""

import pytest
from transformers import LlamaConfig, MllamaConfig

import tiny
from mllama.hf.config_objects import compose


def test_cross_attention_layers_belong_to_llama_vision_alone():
    config = LlamaConfig(**tiny.TEXT, cross_attention_layers=[1])
    assert compose(config).text.cross_attention_layers == ()
    with pytest.raises(ValueError, match="cross_attention_layers"):
        tiny.config(text={"cross_attention_layers": [1]})
    with pytest.raises(ValueError, match="cross_attention_layers"):
        compose(MllamaConfig(text_config={"cross_attention_layers": [0, 5]}))


def test_heads_that_the_attention_operator_does_not_take():
    with pytest.raises(ValueError, match="attention_heads"):
        compose(MllamaConfig(vision_config={"attention_heads": 4}))
