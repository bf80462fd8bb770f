"""The edges of every family: odd batches, wrong inputs, configs that cannot be. Each is an answer,
or an error that names what is wrong.
"""

import copy
import json

import pytest
import torch
import transformers

from mllama import MllamaForConditionalGeneration, SiglipModel
from mllama.hf.config_objects import compose
from tiny import close, tokens
from tiny.pairs import LANGUAGE, ONE_EACH, WITH_IMAGES, make, pair
from tiny.stock import DEEPER, TEXT


@pytest.mark.parametrize("case", ONE_EACH)
def test_an_empty_batch_and_one_token(case):
    model, size = pair(case).ours, TEXT["vocab_size"]
    empty = {name: value[:0] for name, value in pair(case).inputs("one row").items()}
    length = empty["input_ids"].shape[1]
    with torch.no_grad():
        assert model(**empty).logits.shape == (0, length, size)
        one = torch.tensor([[5]])
        close(model(input_ids=one).logits, pair(case).theirs(input_ids=one).logits)


@pytest.mark.parametrize("case", LANGUAGE)
def test_float16(case):
    both = make(case)
    batch = both.inputs("two images")
    seen = batch["attention_mask"].bool()
    with torch.no_grad():
        expected = both.ours(**batch).logits[seen]
        got = both.ours.half()(**batch).logits
    assert got.dtype == torch.float16
    close(got[seen].float(), expected, tolerance=0.05)


@pytest.mark.parametrize("case", ["llama", "gemma"])
def test_a_model_of_text_takes_no_images(case):
    model, words = pair(case).ours, torch.tensor([tokens(4)])
    for given in (
        {"pixel_values": torch.zeros(1, 3, 16, 16)},
        {"image_features": torch.zeros(1, 4, 64)},
    ):
        with pytest.raises(ValueError, match="pixel_values"):
            model(input_ids=words, **given)
    with pytest.raises(ValueError, match="text alone"):
        model.get_image_features(torch.zeros(1, 3, 16, 16))


@pytest.mark.parametrize("case", WITH_IMAGES)
def test_placeholders_that_do_not_match_the_images(case):
    both = pair(case)
    model, batch = both.ours, both.inputs("one row")
    tokens = model.spec.tokens_per_image
    for count in (0, 2):
        with pytest.raises(
            ValueError, match=f"{tokens} image placeholders.*{count * tokens} features"
        ):
            model(**batch | {"pixel_values": both.images(count)})
    with pytest.raises(ValueError, match=f"{tokens} image placeholders"):
        model(batch["input_ids"])
    with pytest.raises(ValueError, match="pixel_values must be"):
        model(**batch | {"pixel_values": both.images(1)[..., 1:]})


@pytest.mark.parametrize("case", ONE_EACH)
def test_ids_and_labels_out_of_range(case):
    both = pair(case)
    model, size = both.ours, TEXT["vocab_size"]
    for wrong in (size, -1):
        with pytest.raises(IndexError, match=f"input_ids.*{size - 1}"):
            model(torch.tensor([[1, wrong]]))
        with pytest.raises(ValueError, match="labels"):
            model(torch.tensor([[1, 2, 3]]), labels=torch.tensor([[1, 2, wrong]]))


@pytest.mark.parametrize("case", WITH_IMAGES)
def test_placeholders_in_the_labels_are_not_trained(case):
    """Even where their id lies beyond the vocabulary."""
    both = pair(case)
    batch = both.inputs("two images", "right")
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    hidden = labels.masked_fill(labels == both.ours.config.image_token_index, -100)
    with torch.no_grad():
        assert torch.equal(*(both.ours(**batch, labels=given).loss for given in (labels, hidden)))


PROMPT = torch.tensor([tokens(4), tokens(4, 3)])


@pytest.mark.parametrize(
    ("error", "named", "types"),
    [
        (ValueError, "here a 0 follows a 1", torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1]])),
        (ValueError, "token_type_ids", torch.zeros(2, 3, dtype=torch.long)),
        (TypeError, "token_type_ids", torch.zeros(2, 4)),
        (TypeError, "token_type_ids", [[0, 0, 1, 1]]),
    ],
)
def test_wrong_token_types(error, named, types):
    model = pair("paligemma").ours
    with pytest.raises(error, match=named):
        model(PROMPT, token_type_ids=types)
    with pytest.raises(error, match=named):
        model.generate(
            PROMPT, attention_mask=torch.ones_like(PROMPT), token_type_ids=types, max_new_tokens=1
        )


def test_token_types_mean_nothing_to_other_families():
    model = pair("llama").ours
    with torch.no_grad():
        assert torch.equal(
            model(PROMPT, token_type_ids=torch.ones_like(PROMPT)).logits, model(PROMPT).logits
        )


@pytest.mark.parametrize("case", [*ONE_EACH, "siglip_vision_model"])
def test_a_config_shared_with_a_stock_model_stays_as_it_was(case):
    theirs = make(case).theirs
    for kind in ("eager", "flex_attention" if "gemma2" in case else "sdpa"):  # that stock has
        theirs.set_attn_implementation(kind)
        before = copy.deepcopy(theirs.config)
        ours = type(pair(case).ours)(theirs.config)
        assert vars(theirs.config).keys() == vars(before).keys()
    assert (
        theirs.config.to_dict() == before.to_dict() and theirs.config._attn_implementation == kind
    )
    assert ours.config._attn_implementation == "eager" and type(ours.config) is type(before)


# Case, part of the config, field, values that cannot be. Configs of transformers refuse some of
# them themselves, when they are set.
HOSTILE = [
    ("llama", None, "hidden_size", (0, -64, True, 2**31, 2**70, 63, 2.5, "64")),
    ("llama", None, "num_hidden_layers", (-1, 0, True, 2**31)),
    ("llama", None, "num_attention_heads", (0, -4, False, 3)),
    ("llama", None, "num_key_value_heads", (0, 3, -2)),
    ("llama", None, "head_dim", (0, -1, 15, 257, True)),
    ("llama", None, "vocab_size", (0, -1, True, 2**33)),
    ("llama", None, "rms_norm_eps", (0.0, -1.0, float("nan"), True)),
    ("llama", None, "hidden_act", ("relu", "os.system", 5)),
    ("llama", None, "attention_dropout", (0.5,)),
    ("llama", None, "rope_parameters", (5, [1], "x")),
    ("llama", None, "sliding_window", (4,)),
    ("llama", None, "layer_types", (["sliding_attention"] * 2, ["x"])),
    ("llama", None, "eos_token_id", (2**70,)),
    ("gemma", None, "use_bidirectional_attention", (True,)),
    ("gemma", None, "hidden_size", (0, True, 2**40)),
    ("gemma2", None, "use_bidirectional_attention", (True,)),
    ("gemma2", None, "sliding_window", (0, -1, True, None)),
    ("gemma2", None, "layer_types", (["full_attention", "chunked_attention"],)),
    ("gemma2", None, "query_pre_attn_scalar", (0, -3)),
    ("gemma2", None, "attn_logit_softcapping", (0.0, -1.0, float("inf"))),
    ("gemma2", None, "final_logit_softcapping", (0.0, -1.0)),
    ("gemma3_text", None, "attn_logit_softcapping", (5.0,)),
    ("gemma3_text", None, "use_bidirectional_attention", (True,)),
    ("siglip_vision_model", None, "image_size", (0, 7, True, -16, 2**31 - 1)),
    ("siglip_vision_model", None, "patch_size", (0, 17, True)),
    ("siglip_vision_model", None, "num_channels", (0, True)),
    ("siglip_vision_model", None, "layer_norm_eps", (0, -1.0)),
    ("llava, clip, -2", None, "vision_feature_layer", (4, -5, 99, [], [0, 9], True)),
    ("llava, clip, -2", None, "vision_feature_select_strategy", ("most", "")),
    ("llava, clip, -2", None, "projector_hidden_act", ("os.system",)),
    ("llava, clip, -2", None, "image_token_index", (-1, True, 2**70)),
    ("llava, clip, -2", "vision_config", "num_attention_heads", (0, 3, -1)),
    ("llava, clip, -2", "vision_config", "image_size", (0, True, 2**31 - 1)),
    ("llava, clip, -2", "text_config", "num_hidden_layers", (0, -2, 2**31)),
    ("paligemma", None, "projection_dim", (63, 0, -1)),
    ("paligemma", None, "image_token_index", (-5, True)),
    ("paligemma", "vision_config", "hidden_size", (0, 31, True)),
    ("paligemma", "text_config", "head_dim", (0, 300)),
]

QUANTIZED = [
    ("llama", None, "quantization_config", (False, {"bits": 4})),
    ("llava, clip, -2", "text_config", "quantization_config", (False, {"bits": 4})),
]


def at(config, part: str | None):
    return (
        config
        if part is None
        else config[part]
        if isinstance(config, dict)
        else getattr(config, part)
    )


@pytest.mark.parametrize(("case", "part", "field", "values"), HOSTILE)
def test_configs_that_cannot_be(case, part, field, values):
    for value in values:
        config = copy.deepcopy(pair(case).theirs.config)
        try:
            setattr(at(config, part), field, value)
        except Exception:
            continue  # transformers took offence already
        with pytest.raises(ValueError, match=field):
            SiglipModel(config) if case.startswith("siglip") else compose(config)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each case, and the content of its config.json."""
    made = {}

    def folder(case: str):
        if case not in made:
            path = tmp_path_factory.mktemp("model")
            pair(case).ours.save_pretrained(path)
            made[case] = path, json.loads((path / "config.json").read_text())
        return made[case]

    return folder


@pytest.mark.parametrize(("case", "part", "field", "values"), [*HOSTILE, *QUANTIZED])
def test_folders_whose_config_cannot_be(case, part, field, values, folders):
    path, content = folders(case)
    for value in values:
        changed = copy.deepcopy(content)
        at(changed, part)[field] = value
        (path / "config.json").write_text(json.dumps(changed))
        with pytest.raises(
            ValueError, match=f"{field}|{field.replace('_', ' ').removeprefix('num ')}"
        ):
            type(pair(case).ours).from_pretrained(path)


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope", "proportional", "__class__"])
def test_rotary_types_that_are_not_supported_are_named(kind, folders):
    path, content = folders("llama")
    scaling = {
        "rope_type": kind,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "long_factor": [1.0] * 8,
    }
    config = transformers.LlamaConfig(**TEXT)
    config.rope_parameters = scaling | {"rope_theta": 1e4}
    with pytest.raises(ValueError, match=f"rope_type.*{kind}"):
        compose(config)
    (path / "config.json").write_text(json.dumps(content | {"rope_scaling": scaling}))
    with pytest.raises(ValueError, match=kind):
        MllamaForConditionalGeneration.from_pretrained(path)


@pytest.mark.parametrize(
    ("error", "named", "config"),
    [
        (TypeError, "config", {"model_type": "llama"}),
        (ValueError, "model_type", transformers.MistralConfig()),
        (ValueError, "'gemma3'", transformers.Gemma3Config()),
        (
            ValueError,
            "text_config.*'mistral'",
            transformers.LlavaConfig(text_config={"model_type": "mistral"}, vision_config=DEEPER),
        ),
        (
            ValueError,
            "model_type.*'gemma3_text'",
            transformers.PaliGemmaConfig(text_config={"model_type": "gemma3_text"}),
        ),
        (
            ValueError,
            "model_type.*'vit'",
            transformers.LlavaConfig(vision_config={"model_type": "vit"}, text_config=TEXT),
        ),
    ],
)
def test_other_families_are_refused_by_name(error, named, config):
    with pytest.raises(error, match=named):
        MllamaForConditionalGeneration(config)
