"""Placeholders that the model says itself, or that something proposes to it: text, with and without
a cache.
"""

import pytest
import torch

import tiny
from families.test_arguments import PALIGEMMA
from tiny import pairs

LLAVA = "llava, clip, -2"
LENGTH = {"max_new_tokens": 8, "min_new_tokens": 8, "pad_token_id": 0}


@pytest.fixture
def says_placeholders(monkeypatch):
    """A pair whose likeliest token is the placeholder, at every second step."""

    def make(family):
        ours = pairs.make(family).ours
        token, head = tiny.IMAGE, ours.lm_head.forward

        def forward(states):
            logits = head(states).clone()
            logits[..., token] = logits.amax(-1) + (logits[..., 0] > 0).float() * 20 - 10
            return logits

        monkeypatch.setattr(ours.lm_head, "forward", forward)
        return ours

    return make


@pytest.mark.parametrize("rows", ["one image", "a row without an image", "no image"])
@pytest.mark.parametrize("family", [LLAVA, PALIGEMMA])
def test_the_model_says_a_placeholder(says_placeholders, family, rows):
    ours = says_placeholders(family)
    given = pairs.pair(family).inputs(rows)
    for options in (
        {"do_sample": False},
        {"do_sample": False, "num_beams": 3},
        {"do_sample": True},
    ):
        said = []
        for use_cache in (True, False):
            torch.manual_seed(0)
            said.append(
                ours.generate(**given, **LENGTH, **options, use_cache=use_cache)[
                    :, given["input_ids"].shape[1] :
                ]
            )
        assert (said[0] == tiny.IMAGE).any()
        assert said[0].tolist() == said[1].tolist()


def test_a_prompt_with_too_many_placeholders_stays_an_error():
    pair, given = pairs.with_inputs(LLAVA)
    given = given | {
        "input_ids": torch.cat([given["input_ids"], torch.full((2, 1), tiny.IMAGE)], 1),
        "attention_mask": None,
    }
    for use_cache in (True, False):
        with pytest.raises(ValueError, match="placeholders"):
            pair.ours.generate(**given, **LENGTH, use_cache=use_cache)


@pytest.mark.parametrize(
    "family", [LLAVA, "paligemma, placeholder beyond the vocabulary", "mllama"]
)
def test_prompt_lookup_that_proposes_a_placeholder(family):
    """The prompt's last words stand before an image, too: what follows them there is proposed."""
    if family == "mllama":
        ours, given = pairs.with_inputs(family)[0].ours, pairs.with_inputs(family)[1]
        given = {name: value[:1] for name, value in given.items() if name != "cross_attention_mask"}
        given["input_ids"] = torch.tensor([[5, 6, ours.config.image_token_index, 7, 5, 6]])
    else:
        pair = pairs.pair(family)
        ours, placeholders = (
            pair.ours,
            [pair.ours.config.image_token_index] * pair.ours.spec.tokens_per_image,
        )
        given = tiny.batch([5, 6, *placeholders, 7, 5, 6]) | {"pixel_values": pair.images(1)}
    greedy = ours.generate(**given, **LENGTH, do_sample=False)
    assert (
        ours.generate(**given, **LENGTH, do_sample=False, prompt_lookup_num_tokens=4).tolist()
        == greedy.tolist()
    )


def test_an_assistant_that_proposes_placeholders(says_placeholders):
    assistant, ours = says_placeholders(LLAVA), pairs.pair(LLAVA).ours
    given = tiny.batch([5, *[tiny.IMAGE] * 4, 7, 6]) | {"pixel_values": pairs.pair(LLAVA).images(1)}
    greedy = ours.generate(**given, **LENGTH, do_sample=False)
    assert (
        ours.generate(**given, **LENGTH, do_sample=False, assistant_model=assistant).tolist()
        == greedy.tolist()
    )
    for model in (assistant,):  # the model that says them, with itself as its assistant
        said = model.generate(**given, **LENGTH, do_sample=False)
        assert (
            model.generate(**given, **LENGTH, do_sample=False, assistant_model=model).tolist()
            == said.tolist()
        )
