"""A model's defaults of generation: which a session has, and what is refused."""

import pytest

from mllama.runtime.settings import beyond_session, check_settings

LLAMA = {
    "_from_model_config": True,
    "bos_token_id": 128000,
    "do_sample": True,
    "eos_token_id": [128001, 128008, 128009],
    "temperature": 0.6,
    "top_p": 0.9,
    "transformers_version": "4.45.0.dev0",
}


def test_settings_of_released_models_need_no_transformers():
    gemma = {"cache_implementation": "hybrid", "top_k": 64, "eos_token_id": [1, 106]}
    spelled_out = {"num_beams": 1, "length_penalty": 1.0, "min_length": 0, "use_cache": True}
    assert not any(map(beyond_session, ({}, LLAMA, gemma, spelled_out)))


@pytest.mark.parametrize(
    "setting",
    [
        {"num_beams": 2},
        {"no_repeat_ngram_size": 3},
        {"min_new_tokens": 1},
        {"suppress_tokens": [5]},
        {"typical_p": 0.9},
        {"of_tomorrow": 1},
    ],
)
def test_settings_that_a_session_does_not_have(setting):
    assert beyond_session(LLAMA | setting) == list(setting)


@pytest.mark.parametrize("setting", [{"temperature": "hot"}, {"top_p": 7}, {"top_k": -1}])
def test_settings_that_cannot_be(setting):
    check_settings("here", LLAMA)
    with pytest.raises(ValueError, match=f"here: .*{next(iter(setting))}"):
        check_settings("here", LLAMA | setting)
