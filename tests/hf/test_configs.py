"""MllamaConfig: checks of every size, spellings of the rotary frequencies, and round trips."""

import copy
import json

import pytest
from transformers import AutoConfig, LlamaConfig, SiglipVisionConfig
from transformers.models.mllama import MllamaConfig as HFMllamaConfig

import tiny
from mllama import MllamaConfig, MllamaForConditionalGeneration
from mllama.hf.configs import MllamaTextConfig, MllamaVisionConfig
from tiny.sizes import LLAMA32


@pytest.mark.parametrize("kind", [MllamaTextConfig, MllamaVisionConfig])
@pytest.mark.parametrize("name", ["emb_dim", "hidden_dim", "n_heads", "n_layers"])
def test_names_of_older_scripts_are_refused(kind, name):
    with pytest.raises(ValueError, match=name):
        kind(**{name: 8})


def test_a_config_is_not_changed_by_the_model_it_is_given_to():
    text, vision = MllamaTextConfig(**tiny.TEXT), MllamaVisionConfig(**tiny.VISION)
    first = MllamaConfig(vision, text)
    second = MllamaConfig(
        MllamaVisionConfig(**tiny.VISION | {"image_size": 32}),
        text,
        tie_word_embeddings=True,
        use_cache=False,
    )
    assert text.num_image_tokens is None and text.use_cache and not text.tie_word_embeddings
    assert (first.text_config.num_image_tokens, second.text_config.num_image_tokens) == (4, 16)
    assert second.tie_word_embeddings and not first.tie_word_embeddings


def test_the_head_size_follows_the_sizes_given():
    text = MllamaTextConfig(hidden_size=256, num_attention_heads=4, vocab_size=10)
    assert (text.head_dim, text.num_key_value_heads) == (64, 4)


def test_two_bases_of_the_frequencies_are_refused():
    with pytest.raises(ValueError, match="rope_theta"):
        MllamaTextConfig(rope_theta=1e4, rope_parameters={"rope_theta": 5e5})


def test_rope_is_read_from_every_spelling():
    new = {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}
    for given in (
        {"rope_parameters": new},
        {"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
    ):
        assert MllamaTextConfig(**given).rope_parameters == new
    assert MllamaTextConfig().rope_parameters == {"rope_theta": 10000.0, "rope_type": "default"}
    scaled = MllamaTextConfig(rope_scaling=LLAMA32 | {"original_max_position_embeddings": None})
    assert scaled.rope_parameters == LLAMA32 | {
        "rope_theta": 10000.0,
        "original_max_position_embeddings": scaled.max_position_embeddings,
    }


@pytest.mark.parametrize(
    "name",
    [
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
    ]
    + ["max_position_embeddings", "head_dim"],
)
@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_bad_text_sizes_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        MllamaTextConfig(**{name: value})


@pytest.mark.parametrize(
    "name",
    [
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "image_size",
        "patch_size",
    ],
)
@pytest.mark.parametrize("value", [0, -1, 2.5, "8", True])
def test_bad_vision_sizes_are_refused_by_name(name, value):
    with pytest.raises(ValueError, match=name):
        MllamaVisionConfig(**{name: value})


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"hidden_size": 100, "num_attention_heads": 3}, "hidden_size 100"),
        (
            {"hidden_size": 256, "num_attention_heads": 8, "num_key_value_heads": 3},
            "num_attention_heads 8",
        ),
        ({"hidden_size": 600, "num_attention_heads": 2}, "head_dim .* got 300"),
        ({"hidden_size": 34, "num_attention_heads": 2}, "head_dim .*even.*17"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, "low_freq_factor"),
        ({"rope_scaling": 3}, "rope_scaling"),
        ({"rope_theta": -1.0}, "rope_theta"),
        ({"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "full_attention"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"sliding_window": 4}, "sliding_window"),
        ({"layer_types": ["sliding_attention"]}, "layer_types"),
        ({"attention_bias": 1}, "attention_bias"),
        ({"rope_theta": float("inf")}, "rope_theta"),
        ({"rope_theta": 10**400}, "rope_theta"),
        ({"rope_scaling": LLAMA32 | {"low_freq_factor": 4.0}}, "high_freq_factor"),
        ({"vocab_size": 2**40}, "vocab_size"),
        ({"num_labels": 10**12}, "num_labels"),
        ({"to_dict": 3}, "to_dict"),
        ({"__class__": 1}, "__class__"),
        ({"dtype": "foo"}, "dtype"),
        ({"rms_norm_eps": 0}, "rms_norm_eps"),
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"attention_dropout": 0.1}, "attention_dropout"),
        ({"model_type": "gemma"}, "model_type"),
    ],
)
def test_text_configs_that_cannot_be_are_refused(given, named):
    with pytest.raises(ValueError, match=named):
        MllamaTextConfig(**given)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"projection_dim": 0}, "projection_dim"),
        ({"vision_feature": "first"}, "vision_feature"),
        ({"image_token_index": -1}, "image_token_index"),
        ({"ignore_index": "x"}, "ignore_index"),
        ({"projector_hidden_act": "nothing"}, "projector_hidden_act"),
        ({"vision_config": {"image_size": 16, "patch_size": 32}}, "patch_size"),
        ({"vision_config": {"model_type": "clip_vision_model"}}, "clip_vision_model"),
        ({"model_type": "mllama"}, "mllama"),
    ],
)
def test_configs_that_cannot_be_are_refused(given, named):
    with pytest.raises(ValueError, match=named):
        MllamaConfig(**given)


def test_a_sub_config_of_another_kind_is_a_type_error():
    with pytest.raises(TypeError, match="text_config"):
        MllamaConfig(text_config=3)


def test_dicts_and_objects_give_the_same_config():
    objects = MllamaConfig(SiglipVisionConfig(**tiny.VISION), LlamaConfig(**tiny.TEXT))
    assert objects.to_dict() == MllamaConfig(tiny.VISION, tiny.TEXT).to_dict()
    assert objects.text_config.num_attention_heads == 4


def test_the_number_of_image_tokens_is_set():
    assert MllamaConfig({"image_size": 100, "patch_size": 14}).text_config.num_image_tokens == 49


def test_top_level_sizes_fill_what_the_text_config_does_not_say():
    config = MllamaConfig(
        text_config={"num_attention_heads": 4}, vocab_size=77, hidden_size=128, pad_token_index=3
    )
    assert (
        config.text_config.vocab_size,
        config.text_config.hidden_size,
        config.text_config.pad_token_id,
    ) == (77, 128, 3)
    assert (
        config.vocab_size,
        config.hidden_size,
        config.pad_token_index,
        config.projection_dim,
    ) == (77, 128, 3, 128)
    assert MllamaConfig(text_config=tiny.TEXT, vocab_size=77).vocab_size == tiny.VOCAB_SIZE
    assert (
        MllamaConfig(
            text_config={"hidden_size": 64, "num_attention_heads": 4}, hidden_size=128
        ).hidden_size
        == 64
    )


@pytest.mark.parametrize("options", [{}, {"image_token_index": 97}, {"image_token_id": 97}])
def test_what_was_explicit_is_remembered(options, tmp_path):
    config = MllamaConfig(tiny.VISION, tiny.TEXT, **options)
    config.save_pretrained(tmp_path)
    for copied in (
        MllamaConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        MllamaConfig.from_dict(config.to_dict()),
    ):
        assert copied.image_token_index == copied.image_token_id == (97 if options else None)


def test_round_trips_change_nothing(tmp_path):
    config = tiny.config(
        text={"rope_scaling": LLAMA32, "tie_word_embeddings": True},
        ignore_index=-1,
        projection_dim=40,
        vision_feature="last",
    )
    config.save_pretrained(tmp_path)
    json.loads(json.dumps(config.to_dict()))
    for copied in (
        MllamaConfig.from_pretrained(tmp_path),
        MllamaConfig.from_dict(config.to_dict()),
        copy.deepcopy(config),
    ):
        assert copied.to_dict() == config.to_dict()
    assert copied == config
    copied.text_config.hidden_size = 128
    assert copied != config


def test_settings_of_the_decoder_can_be_set_above_it():
    config = tiny.config()
    config.tie_word_embeddings, config.use_cache = True, False
    assert config.text_config.tie_word_embeddings and not config.text_config.use_cache
    assert tiny.config(tie_word_embeddings=True, use_cache=False).to_dict() == config.to_dict()


def test_transformers_own_mllama_is_not_shadowed():
    assert type(AutoConfig.for_model("mllama")) is HFMllamaConfig
    assert type(AutoConfig.for_model(MllamaConfig.model_type)) is MllamaConfig


def test_a_config_that_a_model_holds_is_a_part():
    held = MllamaForConditionalGeneration(LlamaConfig(**tiny.TEXT)).config
    assert MllamaConfig(tiny.VISION, held).text_config.hidden_size == held.hidden_size
