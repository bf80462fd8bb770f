"""`LLAMA32_CONFIG` and `LLAMA32Config`: names, order, defaults."""

import copy
import inspect

import pytest
import torch

from mllama import MllamaConfig
from mllama.dropin._text_config import text_config
from mllama.dropin.model import LLAMA32_CONFIG, LLAMA32Config
from mllama.hf.configs import MllamaTextConfig

ROPE_FREQ = {
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_context_length": 8192,
}
DEFAULTS = {
    "hidden_size": 4096,
    "context_length": 131072,
    "n_heads": 32,
    "n_layers": 16,
    "hidden_dim": 8192,
    "max_position_embeddings": 2048,
    "n_kv_groups": 8,
    "rope_base": 500000.0,
    "rms_norm_eps": 1e-5,
    "dtype": torch.float16,
    "rope_freq": ROPE_FREQ,
    "pad_token_index": None,
}


def test_the_dict():
    assert {
        "vocab_size": 128_256,
        "context_length": 131_072,
        "emb_dim": 2048,
        "n_heads": 32,
        "n_layers": 16,
        "hidden_dim": 8192,
        "n_kv_groups": 8,
        "rope_base": 500_000.0,
        "dtype": torch.bfloat16,
        "rope_freq": ROPE_FREQ,
    } == LLAMA32_CONFIG


def test_signature():
    parameters = inspect.signature(LLAMA32Config).parameters
    assert list(parameters) == ["vocab_size", *DEFAULTS, "kwargs"]
    assert {name: parameters[name].default for name in DEFAULTS} == DEFAULTS | {"rope_freq": None}


def test_omitted_fields_have_the_older_defaults_under_both_spellings():
    config = LLAMA32Config(100)
    assert {name: getattr(config, name) for name in DEFAULTS} == DEFAULTS
    assert (config.num_hidden_layers, config.num_attention_heads, config.num_key_value_heads) == (
        16,
        32,
        8,
    )
    assert (config.intermediate_size, config.emb_dim, config.head_dim, config.pad_token_id) == (
        8192,
        4096,
        128,
        None,
    )
    assert (
        config.rope_parameters["rope_theta"] == 500000.0
        and config.rope_parameters["rope_type"] == "llama3"
    )


def test_by_place():
    config = LLAMA32Config(
        100, 64, 256, 4, 2, 96, 128, 2, 1e4, 1e-6, torch.bfloat16, ROPE_FREQ | {"factor": 8.0}, 7
    )
    values = [getattr(config, name) for name in DEFAULTS]
    assert values == [
        64,
        256,
        4,
        2,
        96,
        128,
        2,
        1e4,
        1e-6,
        torch.bfloat16,
        ROPE_FREQ | {"factor": 8.0},
        7,
    ]


def test_hugging_faces_names_stand_before_the_defaults():
    names = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_hidden_layers": 3,
        "intermediate_size": 96,
        "rope_theta": 1e4,
    }
    config = LLAMA32Config(100, 64, **names, pad_token_id=5, dtype="float32")
    assert (
        config.n_heads,
        config.n_kv_groups,
        config.n_layers,
        config.hidden_dim,
        config.rope_base,
    ) == (4, 2, 3, 96, 1e4)
    assert (
        config.pad_token_index == 5
        and config.dtype == torch.float32
        and config.rope_freq == ROPE_FREQ
    )
    assert LLAMA32Config(100, emb_dim=128).hidden_size == 128
    assert (
        LLAMA32Config(100, rope_parameters={"rope_type": "default", "rope_theta": 1e4}).rope_freq
        is None
    )


def test_it_is_a_config_of_the_package():
    config = LLAMA32Config(100, 64, n_heads=4, n_kv_groups=2)
    config.num_image_tokens, config.dtype = 9, torch.float32
    for other in (
        copy.deepcopy(config),
        LLAMA32Config(**config.to_dict()),
        MllamaConfig(text_config=config).text_config,
    ):
        assert type(other) is LLAMA32Config
        assert {name: getattr(other, name) for name in DEFAULTS} == {
            name: getattr(config, name) for name in DEFAULTS
        }
    assert '"context_length": 131072' in repr(config)


@pytest.mark.parametrize(
    "given, error, words",
    [
        (
            {"n_layers": 4, "num_hidden_layers": 2},
            ValueError,
            "n_layers = 4 and num_hidden_layers = 2",
        ),
        ({"hidden_size": 63}, ValueError, "hidden_size 63"),
        ({"n_kv_groups": 5}, ValueError, "num_key_value_heads 5"),
        ({"context_length": 0}, ValueError, "context_length .* 0"),
        ({"rope_freq": 3}, ValueError, "rope_freq must be a dict"),
        ({"dtype": ["dtype"]}, ValueError, "dtype must be"),
    ],
)
def test_values_that_cannot_be(given, error, words):
    with pytest.raises(error, match=words):
        LLAMA32Config(100, **given)


@pytest.mark.parametrize(
    "given, error, words",
    [
        (3, TypeError, "LLAMA32Config or a dict as LLAMA32_CONFIG, got int"),
        ({"emb_dim": 64}, ValueError, "missing vocab_size, context_length, n_heads"),
        (LLAMA32_CONFIG | {"dtype": ["dtype"]}, ValueError, "dtype must be"),
        (
            LLAMA32_CONFIG | {"dtype": torch.int8},
            ValueError,
            "dtype must be one of torch.float32, .*int8",
        ),
        (
            MllamaTextConfig(norm_offset=1),
            ValueError,
            "norm_offset must be 0 in the older decoder, got 1",
        ),
        (LLAMA32Config(100, attention_bias=True), ValueError, "attention_bias must be False"),
        (LLAMA32Config(100, head_dim=64), ValueError, "head_dim must be 128 .* got 64"),
        (LLAMA32_CONFIG | {"n_heads": 0}, ValueError, "num_attention_heads must be"),
    ],
)
def test_what_the_classes_do_not_take(given, error, words):
    with pytest.raises(error, match=words):
        text_config(given)


def test_a_dict_may_have_more_keys_and_no_frequency_scaling():
    config = text_config(LLAMA32_CONFIG | {"drop_rate": 0.1, "rope_freq": None})
    assert (
        config.rope_freq is None
        and config.rms_norm_eps == 1e-5
        and config.context_length == 131_072
    )
