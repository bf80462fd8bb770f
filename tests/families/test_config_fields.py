"""Fields of every family's config: at other values the model is stock's, or the field is refused by
its name.
"""

import copy
import dataclasses

import pytest
import torch
import transformers

import tiny
from families.test_arguments import LLAVA, PALIGEMMA, llava_inputs
from mllama import MllamaForConditionalGeneration, SiglipModel
from mllama.families import compose
from tiny import pairs

SIGLIP_LLAVA = "llava, siglip, several"
ROPES = [
    {"rope_type": "linear", "rope_theta": 300.0, "factor": 2.0},
    tiny.LLAMA3 | {"rope_theta": 300.0},
    {"rope_type": "dynamic", "rope_theta": 300.0, "factor": 2.0},
    {
        "rope_type": "yarn",
        "rope_theta": 300.0,
        "factor": 2.0,
        "original_max_position_embeddings": 64,
    },
    {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    {
        "full_attention": tiny.LLAMA3 | {"rope_theta": 300.0},
        "sliding_attention": {"rope_type": "linear", "rope_theta": 20.0, "factor": 2.0},
    },
]
# Of every part of a config. What is no dataclass field here is an attribute that stock code asks
# for all the same.
VALUES = {
    "vocab_size": [110],
    "hidden_size": [96],
    "intermediate_size": [40],
    "num_hidden_layers": [4],
    "num_attention_heads": [8],
    "attention_heads": [4],
    "num_key_value_heads": [1, 4],
    "head_dim": [8],
    "hidden_act": ["gelu", "relu", "silu", "gelu_pytorch_tanh", "quick_gelu"],
    "max_position_embeddings": [16],
    "initializer_range": [0.5],
    "initializer_factor": [3.0],
    "rms_norm_eps": [0.3],
    "layer_norm_eps": [0.3],
    "norm_eps": [0.3],
    "use_cache": [False],
    "pad_token_id": [3],
    "bos_token_id": [4],
    "eos_token_id": [5],
    "pretraining_tp": [2],
    "tie_word_embeddings": [True, False],
    "rope_parameters": ROPES,
    "attention_bias": [True],
    "attention_dropout": [0.5],
    "dropout": [0.5],
    "mlp_bias": [True],
    "use_bidirectional_attention": [True],
    "cross_attention_layers": [[2], [1, 2]],
    "num_channels": [1],
    "image_size": [24],
    "patch_size": [4],
    "vision_use_head": [False],
    "projection_dim": [7],
    "num_global_layers": [1],
    "vision_output_dim": [64],
    "max_num_tiles": [5],
    "intermediate_layers_indices": [[1], [0, 1]],
    "supported_aspect_ratios": [[[1, 1], [2, 2]]],
    "image_token_index": [7],
    "image_seq_length": [3],
    "projector_hidden_act": ["relu"],
    "vision_feature_select_strategy": ["default", "full"],
    "vision_feature_layer": [-1, [0, 1]],
    "multimodal_projector_bias": [False],
    "output_hidden_states": [True],
    "return_dict": [True],
    "chunk_size_feed_forward": [1],
    "is_encoder_decoder": [False],
    "problem_type": ["regression"],
    "id2label": [{0: "a"}],
    "label2id": [{"a": 0}],
    "architectures": [["A"]],
    "transformers_version": ["4.0"],
    "sliding_window": [2],
    "attention_chunk_size": [2],
    "layer_types": [["sliding_attention"] * 2],
    "final_logit_softcapping": [1.0, None],
    "attn_logit_softcapping": [1.0, None],
    "query_pre_attn_scalar": [3],
    "hidden_activation": ["gelu", "relu", "silu"],
    "is_causal": [False, True, None],
}
DECODERS = (
    "sliding_window",
    "attention_chunk_size",
    "layer_types",
    "final_logit_softcapping",
    "attn_logit_softcapping",
    "is_causal",
)


def fields(config: transformers.PretrainedConfig, decoder: bool) -> list[str]:
    parts = ("vision_config", "text_config", "dtype")  # the dtype is the weights', of all parts
    names = [field.name for field in dataclasses.fields(config) if field.name not in parts]
    return list(dict.fromkeys([*names, *(DECODERS if decoder else ["is_causal"])]))


def base(family: str):
    return pairs.pair(family).theirs


def build(kind, config):
    """A stock model with the config and ours with its weights; None where stock itself cannot be
    built.
    """
    try:
        theirs = kind(copy.deepcopy(config))
    except Exception:  # noqa: BLE001 what stock refuses in any way is no matter here
        return None
    return pairs.of(tiny.randomize(theirs).eval())


def example(pair: pairs.Pair) -> dict[str, torch.Tensor]:
    if isinstance(pair.ours, SiglipModel):
        config = pair.theirs.config
        return {
            "pixel_values": torch.randn(
                2, config.num_channels, config.image_size, config.image_size
            )
        }
    given = pair.inputs("equal rows")
    if "pixel_values" in given:  # [..., C, S, S]
        channels = pair.ours.spec.vision.num_channels
        given["pixel_values"] = given["pixel_values"][..., :channels, :, :]
    return given


PARTS = [
    (family, part)
    for family in (LLAVA, PALIGEMMA, "mllama")
    for part in ("", "text_config", "vision_config")
]
PARTS += [(SIGLIP_LLAVA, ""), ("paligemma, gemma2", "text_config")]
TEXTS = ("llama", "gemma", "gemma2", "gemma3_text")


@pytest.mark.parametrize(
    ("family", "part"), [*((text, "") for text in TEXTS), ("siglip_vision_model", ""), *PARTS]
)
def test_every_field_is_honored_or_refused(family, part):
    stock = base(family)
    own = getattr(stock.config, part) if part else stock.config
    wrong = []
    for name in fields(own, decoder=part == "text_config" or family in TEXTS):
        for value in VALUES[name]:
            config = copy.deepcopy(stock.config)
            setattr(getattr(config, part) if part else config, name, value)
            if fault := compare(type(stock), config, name):
                wrong.append((name, value, fault))
    assert wrong == []


def compare(kind, config: transformers.PretrainedConfig, name: str) -> str:
    """What is wrong with ours of a config, whose field `name` has an unusual value: nothing where
    it is as stock's, or refused.
    """
    try:
        pair = build(kind, config)
    except ValueError as error:
        return (
            "" if name in str(error) or "vision_output_dim" in str(error) else str(error)
        )  # which follows from others
    if pair is None:
        return ""
    given = example(pair)
    with torch.no_grad():
        expected, got = pair.theirs(**given)[0], pair.ours(**given)[0]
    return (
        ""
        if got.shape == expected.shape
        and (got - expected).abs().max() <= 1e-3 * expected.abs().max()
        else "another result"
    )


def test_an_older_spelling_is_refused_by_its_own_name():
    for value in (0, -1.0, "x", True):
        with pytest.raises(ValueError, match="rope_local_base_freq"):
            compose({"model_type": "gemma3_text", "rope_local_base_freq": value})


@pytest.mark.parametrize("family", pairs.FAMILIES)
def test_fields_set_after_loading_are_read_when_the_model_is_called(family):
    """What stock reads at call time, from the decoder's config; set on the whole it counts too."""
    (ours, theirs), given = pairs.make(family), pairs.with_inputs(family)[1]
    theirs.set_attn_implementation("eager")
    for name in ("output_hidden_states", "output_attentions"):
        for model in (ours, theirs):
            setattr(getattr(model.config, "text_config", model.config), name, True)
    with torch.no_grad():
        mine, stock = ours(**given), theirs(**given)
        for name in ("hidden_states", "attentions"):
            for one, other in zip(mine[name], stock[name], strict=True):
                tiny.close(one, other)
        for config in (ours.config, getattr(ours.config, "text_config", ours.config)):
            assert ours(**given).past_key_values is not None
            config.use_cache = False
            assert ours(**given).past_key_values is None
            config.use_cache = True
    ours.config.return_dict = False
    assert isinstance(ours(**given), tuple)


def test_llava_reads_the_layer_that_its_config_says_after_loading():
    pair = pairs.make(LLAVA)
    given = llava_inputs(pair, 5)
    for model in pair:
        model.config.vision_feature_layer, model.config.vision_feature_select_strategy = 1, "full"
    with torch.no_grad():
        tiny.close(pair.ours(**given).logits, pair.theirs(**given).logits)
        features = pair.theirs.get_image_features(given["pixel_values"]).pooler_output
        tiny.close(pair.ours.get_image_features(given["pixel_values"]), torch.stack(features))
    pair.ours.config.vision_feature_layer = [1, 2]
    with pytest.raises(ValueError, match="vision_feature_layer"):
        pair.ours(**given)


@pytest.mark.parametrize("family", ["llama", "gemma", "gemma3_text", LLAVA])
def test_fewer_layers_set_after_loading(family):
    """As transformers' Llama and Gemma run the first layers alone."""
    (ours, theirs), given = pairs.make(family), pairs.with_inputs(family)[1]
    for model in (ours, theirs):
        getattr(model.config, "text_config", model.config).num_hidden_layers = 1
    with torch.no_grad():
        tiny.close(ours(**given).logits, theirs(**given).logits)
    assert (
        ours.generate(**given, max_new_tokens=4, do_sample=False).tolist()
        == theirs.generate(**given, max_new_tokens=4, do_sample=False).tolist()
    )


@pytest.mark.parametrize(
    ("family", "part", "name", "value"),
    [
        ("llama", "", "rms_norm_eps", 0.1),
        ("llama", "", "num_hidden_layers", 9),
        ("gemma", "", "rope_parameters", {"rope_type": "default", "rope_theta": 7.0}),
        ("gemma2", "", "sliding_window", 9),
        (LLAVA, "text_config", "attention_bias", True),
        (LLAVA, "vision_config", "hidden_act", "relu"),
        (LLAVA, "", "projector_hidden_act", "relu"),
        ("mllama", "vision_config", "supported_aspect_ratios", [[1, 1]]),
        ("mllama", "text_config", "cross_attention_layers", [1]),
    ],
)
def test_fields_that_a_model_is_built_from_cannot_be_set_afterwards(
    family, part, name, value, tmp_path
):
    ours, given = pairs.make(family).ours, pairs.with_inputs(family)[1]
    own = getattr(ours.config, part) if part else ours.config
    before = getattr(own, name)
    setattr(own, name, value)
    with pytest.raises(ValueError, match=name):
        ours(**given)
    with pytest.raises(ValueError, match=name):
        ours.save_pretrained(tmp_path)
    setattr(own, name, before)
    ours(**given)


def test_an_encoders_fields_cannot_be_set_afterwards():
    ours, _ = pairs.make("siglip_vision_model")
    ours.config.layer_norm_eps = 0.5
    with pytest.raises(ValueError, match="layer_norm_eps"):
        ours(pairs.pair("siglip_vision_model").images(1))


def test_a_dict_in_a_config_is_watched_too():
    ours = pairs.make("llama").ours
    ours.config.rope_parameters["rope_theta"] = 5.0
    with pytest.raises(ValueError, match="rope_parameters"):
        ours(torch.tensor([[1, 2]]))


def test_fields_of_the_config_given_to_from_pretrained(tmp_path):
    ours, theirs = pairs.pair(LLAVA)
    ours.save_pretrained(tmp_path)
    given = {
        "vision_feature_layer": 1,
        "vision_feature_select_strategy": "full",
        "text_config": {"use_cache": False},
    }
    both = [type(model).from_pretrained(tmp_path, **given).eval() for model in (ours, theirs)]
    inputs = llava_inputs(pairs.pair(LLAVA), 5)
    with torch.no_grad():
        mine, stock = (model(**inputs) for model in both)
    tiny.close(mine.logits, stock.logits)
    assert mine.past_key_values is None and stock.past_key_values is None
    assert MllamaForConditionalGeneration.from_pretrained(
        tmp_path, output_attentions=True
    ).config.output_attentions


@pytest.mark.parametrize(
    ("error", "given", "match"),
    [
        (TypeError, {"vision_feature_layr": -1}, "vision_feature_layr.*vision_feature_layer"),
        (TypeError, {"text_config": {"use_cach": False}}, "use_cach.*use_cache"),
        (TypeError, {"load_in_4bit": True}, "load_in_4bit"),
        (TypeError, {"to_dict": 1}, "to_dict"),
        (ValueError, {"vision_feature_layer": 9}, "vision_feature_layer"),
        (ValueError, {"text_config": {"attention_dropout": 0.5}}, "attention_dropout"),
        (ValueError, {"text_config": {"vocab_size": 200}}, "embed_tokens"),
        (ValueError, {"image_token_index": "x"}, "image_token_index"),
        (ValueError, {"attn_implementation": "flash_attention_2"}, "attn_implementation"),
    ],
)
def test_fields_that_from_pretrained_refuses(error, given, match, tmp_path):
    pairs.pair(LLAVA).ours.save_pretrained(tmp_path)
    with pytest.raises(error, match=match):
        MllamaForConditionalGeneration.from_pretrained(tmp_path, **given)
