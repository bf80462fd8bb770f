"""Arguments of stock forward passes and of `generate`: each is honored with stock's values, or
refused by its name.
"""

import inspect

import pytest
import torch
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils.generic import TransformersKwargs

import tiny
from tiny import pairs

# Switches that any object turns on; tests elsewhere compare what they return.
SWITCHES = {"use_cache", "output_attentions", "output_hidden_states"}
# Of no meaning in these families, with and without experts or packed rows.
PASSED_OVER = {"output_router_logits"}
LLAVA = "llava, clip, -2"
PALIGEMMA = "paligemma"


def stock_names(model) -> list[str]:
    names = [
        *inspect.signature(inspect.unwrap(type(model).forward)).parameters,
        *TransformersKwargs.__annotations__,
    ]
    return [name for name in dict.fromkeys(names) if name not in ("self", "kwargs")]


@pytest.mark.parametrize("family", pairs.FAMILIES)
def test_no_argument_of_the_stock_forward_is_swallowed(family):
    """What no code looks at raises nothing for any object: it must be a switch or on the list."""
    (ours, theirs), given = pairs.with_inputs(family)
    given["labels"] = given["input_ids"]
    with torch.no_grad():
        swallowed = [
            name
            for name in stock_names(theirs)
            if name not in SWITCHES and not _looks_at(ours, given, name)
        ]
    assert set(swallowed) <= PASSED_OVER


def _looks_at(call, given: dict, name: str) -> bool:
    rest = {
        key: value
        for key, value in given.items()
        if key not in (name, "pixel_values" if name in ENCODED else name)
    }
    if name == "inputs_embeds":
        del rest["input_ids"]
    try:
        call(**rest | {name: object()})
    except (TypeError, ValueError, AttributeError, IndexError):
        return True
    return False


ENCODED = {"mm_encoder_outputs", "cross_attention_states"}


@pytest.mark.parametrize("family", pairs.FAMILIES)
def test_no_argument_of_the_stock_forward_is_swallowed_by_generate(family):
    (ours, theirs), given = pairs.with_inputs(family)

    def generate(**kwargs):
        ours.generate(**kwargs, max_new_tokens=2, do_sample=False)

    names = [
        name for name in stock_names(theirs) if name not in SWITCHES | {"labels"}
    ]  # generate never trains
    assert {name for name in names if not _looks_at(generate, given, name)} <= PASSED_OVER | {
        "num_items_in_batch",
        "token_type_ids",
    }


@pytest.mark.parametrize(
    ("name", "near"),
    [("vision_feature_layers", "vision_feature_layer"), ("pixel_value", "pixel_values")],
)
def test_an_unknown_argument_is_refused_with_the_nearest(name, near):
    pair, given = pairs.with_inputs(LLAVA)
    with pytest.raises(TypeError, match=rf"{name}.*{near}"):
        pair.ours(**given, **{name: 1})
    siglip = pairs.pair("siglip_vision_model")
    with pytest.raises(TypeError, match="interpolate_pos_encodings.*interpolate_pos_encoding"):
        siglip.ours(siglip.images(1), interpolate_pos_encodings=True)


@pytest.mark.parametrize(
    ("family", "name", "value"),
    [
        (LLAVA, "image_sizes", torch.tensor([[16, 16]])),
        (LLAVA, "is_causal", False),
        (LLAVA, "is_causal", True),  # transformers' CLIP would be, too
        (LLAVA, "aspect_ratio_ids", torch.ones(2, 1)),
        (LLAVA, "prefix_length", torch.ones(2)),
        (PALIGEMMA, "vision_feature_layer", -1),
        (PALIGEMMA, "cross_attention_mask", torch.ones(2, 6, 1, 4)),
        ("llama", "interpolate_pos_encoding", True),
        ("llama", "mm_encoder_outputs", {}),
        ("mllama", "vision_feature_select_strategy", "full"),
        ("mllama", "interpolate_pos_encoding", True),
        ("mllama", "mm_encoder_outputs", {}),
    ],
)
def test_arguments_of_other_families_are_refused_by_name(family, name, value):
    pair, given = pairs.with_inputs(family)
    with pytest.raises(ValueError, match=name):
        pair.ours(**given | {name: value})


def test_what_trainers_hand_on_is_taken():
    pair, given = pairs.with_inputs(LLAVA)
    extras = {
        "use_cache": False,
        "return_dict": True,
        "logits_to_keep": 0,
        "output_router_logits": True,
        "num_items_in_batch": 3,
    }
    tiny.close(pair.ours(**given, **extras).logits, pair.theirs(**given).logits)


def llava_inputs(pair, tokens: int) -> dict[str, torch.Tensor]:
    rows = [
        [*tiny.tokens(2, seed=row), *[tiny.IMAGE] * tokens, *tiny.tokens(5, seed=9 + row)]
        for row in range(2)
    ]
    return tiny.batch(*rows) | {"pixel_values": pair.images(2)}


@pytest.mark.parametrize(
    ("layer", "strategy", "tokens"),
    [(-1, "default", 4), ([0], "full", 5), (None, "full", 5), ([-3], None, 4)],
)
def test_llava_reads_the_layer_and_the_features_that_a_call_names(layer, strategy, tokens):
    pair = pairs.pair(LLAVA)
    given = llava_inputs(pair, tokens) | {
        "vision_feature_layer": layer,
        "vision_feature_select_strategy": strategy,
    }
    with torch.no_grad():
        tiny.close(pair.ours(**given).logits, pair.theirs(**given).logits)
        how = {
            name: given[name]
            for name in ("pixel_values", "vision_feature_layer", "vision_feature_select_strategy")
        }
        tiny.close(
            pair.ours.get_image_features(**how),
            torch.stack(pair.theirs.get_image_features(**how).pooler_output),
        )
    for options in ({}, {"num_beams": 2}):
        said = [
            model.generate(**given, max_new_tokens=5, min_new_tokens=5, do_sample=False, **options)
            for model in pair
        ]
        assert said[0].tolist() == said[1].tolist()


def test_layers_that_the_projector_is_not_made_for_are_refused():
    pair = pairs.pair(LLAVA)
    for layer in ([-1, -2], -9, True, "last"):
        with pytest.raises(ValueError, match="vision_feature_layer"):
            pair.ours(**llava_inputs(pair, 4), vision_feature_layer=layer)
    with pytest.raises(ValueError, match="vision_feature_select_strategy"):
        pair.ours(**llava_inputs(pair, 4), vision_feature_select_strategy="all")


@pytest.mark.parametrize("family", [LLAVA, PALIGEMMA])
def test_features_that_stock_encoded_are_taken(family):
    pair, given = pairs.with_inputs(family)
    with torch.no_grad():
        encoded = {"image": pair.theirs.get_image_features(given.pop("pixel_values"))}
        tiny.close(
            pair.ours(**given, mm_encoder_outputs=encoded).logits,
            pair.theirs(**given, mm_encoder_outputs=encoded).logits,
        )
    said = [
        model.generate(**given, mm_encoder_outputs=dict(encoded), max_new_tokens=4, do_sample=False)
        for model in pair
    ]
    assert said[0].tolist() == said[1].tolist()
    with pytest.raises(ValueError, match="mm_encoder_outputs"):
        pair.ours(**given, mm_encoder_outputs={"video": BaseModelOutputWithPooling()})


def test_cross_attention_states_are_attended_to():
    pair, given = pairs.with_inputs("mllama")
    with torch.no_grad():
        plain = pair.theirs(**given).logits
        vision = pair.theirs.model.vision_model(
            given["pixel_values"], given["aspect_ratio_ids"], given["aspect_ratio_mask"]
        )
        states = pair.theirs.model.multi_modal_projector(vision.last_hidden_state)
        states = states.reshape(-1, states.shape[-2], states.shape[-1])
        for model in pair:
            mask = given["cross_attention_mask"]
            tiny.close(
                model(
                    given["input_ids"], cross_attention_states=states, cross_attention_mask=mask
                ).logits,
                plain,
            )
    with pytest.raises(ValueError, match="cross_attention_states"):
        pair.ours(given["input_ids"], cross_attention_states=states[:3, :1])


@pytest.mark.parametrize("size", [(24, 24), (16, 32), (8, 17)])
def test_images_of_other_sizes(size):
    """Positions between the learned ones, in every model with such an encoder."""
    pixels = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(5))
    how = {"interpolate_pos_encoding": True}
    siglip = pairs.pair("siglip_vision_model")
    with torch.no_grad():
        for name in ("last_hidden_state", "pooler_output"):
            tiny.close(siglip.ours(pixels, **how)[name], siglip.theirs(pixels, **how)[name])
        for family in (LLAVA, "llava, siglip, -1", PALIGEMMA):
            ours, theirs = pairs.pair(family)
            encoded = {"image": theirs.get_image_features(pixels, **how)}
            tokens = (size[0] // 8) * (size[1] // 8)
            given = tiny.batch(
                *[[*[tiny.IMAGE] * tokens, *tiny.tokens(4, seed=row)] for row in range(2)]
            )
            if family == PALIGEMMA:
                given["token_type_ids"] = torch.zeros_like(given["input_ids"])
            tiny.close(
                ours(**given, pixel_values=pixels, **how).logits,
                theirs(**given, mm_encoder_outputs=encoded).logits,
            )
            said = ours.generate(**given, pixel_values=pixels, **how, max_new_tokens=3, num_beams=2)
            assert said[:, :-3].tolist() == given["input_ids"].tolist()
    with pytest.raises(ValueError, match="pixel_values"):
        siglip.ours(pixels)


def test_features_are_read_by_both_releases_names():
    pair, given = pairs.with_inputs(LLAVA)
    with torch.no_grad():
        mine, stock = (model(**given) for model in pair)
    expected = torch.cat([features.reshape(-1, 64) for features in stock.image_hidden_states])
    for features in (mine.image_hidden_states, mine.image_outputs.pooler_output):
        tiny.close(features.flatten(0, 1), expected)
    assert pair.ours(given["input_ids"][:, -3:]).image_outputs is None
