"""Targets by scope, range, expression and name, in every family."""

import re

import pytest
import torch
from torch import nn

import mllama
import tiny
from mllama.lora.scopes import find_targets
from tiny.pairs import FAMILIES, make

DECODER = re.compile(r"language_model\.layers\.\d+\.")


# LLaVA's -2: the features of the last layer but one, of 3.
LAST = "vision_tower.encoder.layers.2."
UNREAD = {"llava, clip, -2": LAST, "llava, siglip, several": LAST}


def linear_names(model) -> set[str]:
    return {name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}


@pytest.fixture(scope="module")
def crossed():
    """Llama-3.2-Vision: five decoder layers, 1 and 3 with cross-attention."""
    return make("mllama").ours


@pytest.mark.parametrize("case", FAMILIES)
def test_scopes_of_every_family(case):
    model = make(case).ours
    names = linear_names(model)
    decoder = {name for name in names if DECODER.match(name)}
    expected = {
        "attn": {name for name in decoder if ".self_attn." in name},
        "mlp": {name for name in decoder if ".mlp." in name},
        "cross_attn": {name for name in decoder if ".cross_attn." in name},
        "all-linear": decoder,
        "vision": {
            name
            for name in names
            if name.startswith("vision_tower.") and not name.startswith(UNREAD.get(case, "none"))
        },
        "vision_global": {name for name in names if ".global_transformer." in name},
        "projector": {name for name in names if name.startswith("multi_modal_projector.")},
    }
    assert expected["attn"] | expected["mlp"] | expected["cross_attn"] == decoder
    for scope, wanted in expected.items():
        if wanted:
            assert set(find_targets(model, scope)) == wanted, scope
        else:
            with pytest.raises(ValueError, match=f"'{scope}'.*it has .*all-linear.*q_proj"):
                find_targets(model, scope)


@pytest.mark.parametrize(
    ("target", "layers"),
    [
        ("attn[0:3]", {0, 2}),
        ("attn[2]", {2}),
        ("attn[-1]", {4}),
        ("mlp[-2:]", {3, 4}),
        ("mlp[:1]", {0}),
        ("mlp[:]", {0, 1, 2, 3, 4}),
        ("cross_attn[2:]", {3}),
        ("all-linear[1]", {1}),
    ],
)
def test_ranges_count_the_decoders_layers(crossed, target, layers):
    scope = target.partition("[")[0]
    names = find_targets(crossed, scope)
    expected = {name for name in names if int(name.split(".")[2]) in layers}
    assert expected and set(find_targets(crossed, target)) == expected


def test_a_range_of_the_encoder_is_of_each_of_its_stacks(crossed):
    names = find_targets(crossed, "vision[-1:]")
    stacks = {name.partition(".layers.")[0]: name.split(".layers.")[1][0] for name in names}
    tower = crossed.vision_tower
    assert stacks == {
        "vision_tower.transformer": str(len(tower.transformer.layers) - 1),
        "vision_tower.global_transformer": str(len(tower.global_transformer.layers) - 1),
    }


def test_layers_that_are_not_computed_are_left_out():
    """Their adapters would get no gradient."""
    model = make("llava, clip, -2").ours
    layers = {name.split(".")[3] for name in find_targets(model, "vision")}
    assert layers == {"0", "1"} == {name.split(".")[3] for name in find_targets(model, "fc1")}
    assert {name.split(".")[3] for name in find_targets(model, "vision[-2:]")} == {"1"}
    last = "vision_tower.encoder.layers.2.mlp.fc1"
    for target in ("vision[-1]", last):
        with pytest.raises(ValueError, match="does not compute"):
            find_targets(model, target)
    last = "vision_tower.encoder.layers.1.mlp.fc1"
    assert list(find_targets(tiny.model(), last)) == [last]


def test_names_are_the_decoders_where_it_has_them():
    model = tiny.model()
    assert {name.split(".")[0] for name in find_targets(model, ["q_proj"])} == {"language_model"}
    assert {name.split(".")[0] for name in find_targets(model, ["fc1"])} == {"vision_tower"}
    tower = "vision_tower.encoder.layers.0.self_attn.q_proj"
    assert list(find_targets(model, tower)) == [tower]
    assert list(find_targets(model, "lm_head")) == ["lm_head"]


def test_expressions_are_of_whole_names():
    model = tiny.model()
    found = find_targets(model, r"re:.*\.(q|v)_proj")
    assert {name.split(".")[0] for name in found} == {"language_model", "vision_tower"}
    with pytest.raises(ValueError, match="matches nothing"):
        find_targets(model, "re:q_proj")


def test_ranks_by_pattern_the_first_one_counts():
    found = find_targets(
        tiny.model(), ["attn[0]"], {"q_proj": 4, r"layers\.0\.self_attn\.[qk]_proj": 2}
    )
    assert {name.rpartition(".")[2]: rank for name, rank in found.items()} == {
        "q_proj": 4,
        "k_proj": 2,
        "v_proj": None,
        "o_proj": None,
    }


@pytest.mark.parametrize(
    ("targets", "ranks", "said"),
    [
        ("vison", None, "'vison'"),
        (["attn", "W_query"], None, "'W_query'"),
        ("attn[7:]", None, r"attn\[7:\].*0, 1"),
        ("projector[0]", None, "not numbered"),
        ("attn[a]", None, r"attn\[a\]"),
        ("attn[]", None, r"attn\[\]"),
        ("q_proj[0]", None, "q_proj"),
        ("re:(", None, "regular expression"),
        ([], None, "targets"),
        ("attn", {"gate_proj": 2}, "gate_proj"),
        ("attn", {"(": 2}, "regular expression"),
    ],
)
def test_what_matches_nothing_is_refused_by_name(targets, ranks, said):
    with pytest.raises(ValueError, match=said):
        find_targets(tiny.model(), targets, ranks)


def test_other_types_are_refused():
    with pytest.raises(TypeError, match="targets"):
        find_targets(tiny.model(), [1])
    with pytest.raises(TypeError, match="ranks"):
        find_targets(tiny.model(), "attn", [2])


def test_layers_with_adapters_packed_ones_and_wrappers_count():
    plain = find_targets(tiny.model(), "attn")
    adapted = tiny.model()
    mllama.convert_linears_to_lora(adapted.language_model)
    packed = mllama.optimize(tiny.model(), "int8")
    wrapped = torch.compile(tiny.model())
    assert plain == find_targets(adapted, "attn")
    assert plain == find_targets(packed, "attn")
    assert plain == find_targets(wrapped, "attn")
