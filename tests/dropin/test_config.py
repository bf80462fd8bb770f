"""`MLLAMAConfig`: its arguments and defaults, what it reads, and that the package reads what it
writes.
"""

import copy
import inspect
import pickle
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, LlamaConfig, SiglipVisionConfig

from dropin import older
from mllama import MllamaConfig
from mllama.dropin._config import MLLAMAConfig
from mllama.dropin._multimodal import MllamaForConditionalGeneration
from mllama.dropin._text_config import LLAMA32Config
from mllama.hf.configs import MllamaTextConfig, MllamaVisionConfig


def test_arguments_and_defaults():
    parameters = inspect.signature(MLLAMAConfig).parameters
    assert {
        name: parameter.default for name, parameter in parameters.items() if name != "kwargs"
    } == {
        "vision_config": None,
        "text_config": None,
        "ignore_index": -100,
        "image_token_index": 128256,
        "vocab_size": 128256,
        "projection_dim": 2048,
        "hidden_size": 2048,
        "pad_token_index": None,
    }


def test_without_arguments_it_is_llama_3_2_1b_with_a_siglip_base():
    config = MLLAMAConfig()
    text, vision = config.text_config, config.vision_config
    assert (text.vocab_size, text.hidden_size, text.n_heads, text.n_layers, text.hidden_dim) == (
        128256,
        2048,
        32,
        16,
        8192,
    )
    assert (text.n_kv_groups, text.rope_base, text.rms_norm_eps) == (8, 500000.0, 1e-5)
    assert (vision.hidden_size, vision.num_hidden_layers, vision.image_size, vision.patch_size) == (
        768,
        12,
        224,
        16,
    )
    assert text.num_image_tokens == 196 and config.dtype == torch.float16


def test_what_a_dict_leaves_out_is_the_older_default():
    text = MLLAMAConfig(text_config={"vocab_size": 99}).text_config
    assert (text.hidden_size, text.num_key_value_heads, text.rope_parameters["rope_theta"]) == (
        4096,
        8,
        500000.0,
    )
    assert text.dtype == torch.float16 and text.rope_freq["factor"] == 32.0


def test_no_word_ends_an_answer_unless_a_script_says_so(tmp_path):
    assert (
        older.config().text_config.eos_token_id is None is older.config().text_config.bos_token_id
    )
    assert older.config(text={"eos_token_id": 9}).text_config.eos_token_id == 9
    older.config().save_pretrained(tmp_path)
    assert AutoConfig.from_pretrained(tmp_path).text_config.eos_token_id is None
    assert MLLAMAConfig(**older.config().to_dict()).text_config.eos_token_id is None


def test_names_of_readmes_that_are_no_fields():
    text = older.TEXT | {"n_kv_heads": 8, "head_dim": 16, "rope_theta": 500000.0}
    config = MLLAMAConfig(older.VISION, text, projection_dim=64, image2text_projection_bias=True)
    assert config.text_config.n_kv_groups == 2 and config.text_config.rope_base == 500000.0


def test_what_scripts_read():
    config = older.config(projection_dim=512, pad_token_index=7)
    assert config.image_token_index == 128256 and f"{config.image_token_index}" == "128256"
    assert config.projection_dim == config.vision_config.projection_dim == 512
    assert config.vocab_size == 99 and config.hidden_size == 64 and config.pad_token_index == 7
    assert config.ignore_index == -100 and config.is_encoder_decoder is False
    assert (
        config.text_config.n_heads,
        config.text_config.num_attention_heads,
        config.text_config.n_kv_groups,
    ) == (4, 4, 2)
    assert config.text_config.num_image_tokens == 4 and config.projector == "linear"
    assert older.config(image_token_index=5).image_token_index == 5


@pytest.mark.parametrize(
    ("vision", "text"),
    [
        (MllamaVisionConfig(**older.VISION), LLAMA32Config(**older.TEXT)),
        (SiglipVisionConfig(**older.VISION), MllamaTextConfig(**older.TEXT)),
        (SimpleNamespace(**older.VISION), SimpleNamespace(**older.TEXT)),
        (older.VISION, LlamaConfig(**LLAMA32Config(**older.TEXT).to_dict())),
    ],
    ids=["older", "package's", "plain objects", "transformers'"],
)
def test_objects_in_place_of_dicts(vision, text):
    config, expected = MLLAMAConfig(vision, text), older.config()
    sizes = ("hidden_size", "num_attention_heads", "num_hidden_layers", "intermediate_size")
    for part in ("vision_config", "text_config"):
        assert all(
            getattr(getattr(config, part), name) == getattr(getattr(expected, part), name)
            for name in sizes
        )
    assert config.text_config.num_image_tokens == 4 and config.text_config is not text


def test_the_callers_dicts_stay_as_they_were():
    vision, text = dict(older.VISION), dict(older.TEXT)
    MLLAMAConfig(vision_config=vision, text_config=text)
    assert vision == older.VISION and text == older.TEXT


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            {"vocab_size": 99, "hidden_size": 64, "n_heads": 4},
            "num_attention_heads 4 .*num_key_value_heads 8 .n_kv_groups",
        ),
        (older.TEXT | {"hidden_size": 65}, "hidden_size 65 is not a multiple"),
        (older.TEXT | {"n_layers": 0}, "num_hidden_layers must be an integer of at least 1"),
    ],
)
def test_sizes_that_cannot_be(text, said):
    with pytest.raises(ValueError, match=said):
        MLLAMAConfig(older.VISION, text)


def test_other_kinds_are_refused():
    with pytest.raises(
        TypeError, match="text_config must be a dict, a config object or None, got int"
    ):
        MLLAMAConfig(older.VISION, 3)
    with pytest.raises(ValueError, match="dtype must be one of .*got torch.float64"):
        older.config(text={"dtype": torch.float64})
    with pytest.raises(
        ValueError, match="image_token_index must be an integer of at least 0, got -1"
    ):
        older.config(image_token_index=-1)


@pytest.mark.parametrize("image_token_index", [None, 97])
def test_what_is_written_the_package_reads(image_token_index, tmp_path):
    config = older.config(image_token_index=image_token_index, projection_dim=512)
    config.save_pretrained(tmp_path)
    read = AutoConfig.from_pretrained(tmp_path)
    assert (
        type(read) is MllamaConfig
        and read.image_token_index == image_token_index
        and read.projector == "linear"
    )
    assert read.projection_dim == read.hidden_size == 64
    assert read.text_config.rope_parameters == config.text_config.rope_parameters
    assert MLLAMAConfig.from_pretrained(tmp_path).image_token_index == (
        128256 if image_token_index is None else 97
    )


@pytest.mark.parametrize(
    "name",
    [{"text": {"dtype": "bfloat16"}}, {"dtype": torch.bfloat16}],
    ids=["of the text", "of the whole"],
)
def test_a_dtype_of_either_config(name):
    assert older.config(**name).dtype == torch.bfloat16
    assert MllamaForConditionalGeneration(older.config(**name)).dtype == torch.bfloat16


def test_the_packages_folders(model_folder):
    config, own = (
        MLLAMAConfig.from_pretrained(model_folder),
        MllamaConfig.from_pretrained(model_folder),
    )
    assert (config.projector, config.projection_dim, config.image_token_index) == (
        "mlp",
        64,
        own.image_token_index,
    )
    model = MllamaForConditionalGeneration.from_pretrained(model_folder, config=config)
    assert not any(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize(
    "clone",
    [
        copy.deepcopy,
        lambda config: pickle.loads(pickle.dumps(config)),
        lambda c: MLLAMAConfig(**c.to_dict()),
    ],
)
def test_copies_know_what_was_not_said(clone):
    assert clone(older.config()).to_dict()["image_token_index"] is None
    assert clone(older.config(image_token_index=128256)).to_dict()["image_token_index"] == 128256
