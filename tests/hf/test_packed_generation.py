"""generate() of a packed model: by `decode_step` it gives what the layers give one by one."""

import contextlib
import copy
import functools
import pickle
from unittest import mock

import pytest
import torch
from transformers import DynamicCache, StaticCache
from transformers.generation import LogitsProcessor, StoppingCriteria

import tiny
from helpers import counted_steps, layer_by_layer, needs_kernels
from mllama.hf.cache import GrowingCacheLayer, _with_room
from mllama.quant.packer import optimize
from tiny import pairs

pytestmark = needs_kernels
IMAGE = [tiny.IMAGE] * tiny.PATCHES
ROWS = [IMAGE + tiny.tokens(6), tiny.tokens(4, 7), tiny.tokens(3) + IMAGE + IMAGE + tiny.tokens(2)]
OPTIONS = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.fixture(scope="module")
def model():
    return optimize(tiny.model(), "f32")


def inputs() -> dict[str, torch.Tensor]:
    return tiny.batch(*ROWS) | {"pixel_values": tiny.images(3)}


def by_layers(model, function):
    """What a function gives where a hook forbids `decode_step`."""
    with layer_by_layer(model), counted_steps() as calls:
        result = function()
    assert calls.call_count == 0
    return result


class Favor(LogitsProcessor):
    def __call__(self, input_ids, scores):
        return scores + (torch.arange(scores.shape[-1]) % 3 == 0)


class AfterFour(StoppingCriteria):
    def __call__(self, input_ids, scores, **kwargs):
        return torch.full((len(input_ids),), input_ids.shape[1] >= max(map(len, ROWS)) + 4)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2, "length_penalty": 0.5},
        {"do_sample": True, "top_k": 20, "top_p": 0.9, "temperature": 0.8},
        {"do_sample": True, "num_return_sequences": 3},
        {"do_sample": True, "min_p": 0.1, "repetition_penalty": 1.3},
        {"do_sample": True, "typical_p": 0.9, "top_k": 20},
        {"logits_processor": [Favor()]},
        {"stopping_criteria": [AfterFour()]},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
    ],
    ids=lambda options: ", ".join(options) or "greedy",
)
def test_every_way_of_choosing_tokens(model, options):
    def generate():
        torch.manual_seed(0)
        return model.generate(**inputs(), **OPTIONS | options)

    with counted_steps() as calls:
        tokens = generate()
    assert calls.call_count >= 3
    assert torch.equal(tokens, by_layers(model, generate))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 2.0},
        {"eos_token_id": [7, 30]},
        {"eos_token_id": [7, 30], "min_new_tokens": 9},
        {"repetition_penalty": 2.0, "no_repeat_ngram_size": 1, "bad_words_ids": [[5]]},
        {"do_sample": True, "temperature": 1e-4, "top_k": 3},
    ],
    ids=str,
)
def test_greedy_tokens_are_those_of_transformers_loop(model, options):
    options = OPTIONS | {"max_new_tokens": 16} | options
    given = model.generate(**inputs(), **options)
    with mock.patch("mllama.hf.generation.find_loop_obstacle", return_value="a test"):
        expected = model.generate(**inputs(), **options)
    assert torch.equal(given, expected)


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 2.0}])
def test_a_prompt_of_embeddings(model, options):
    embeds = model.get_input_embeddings()(torch.tensor([[5, 6, 7], [8, 9, 10]]))
    expected = tiny.model().generate(inputs_embeds=embeds, **OPTIONS | options)
    assert torch.equal(model.generate(inputs_embeds=embeds, **OPTIONS | options), expected)


@pytest.mark.parametrize(("case", "rows"), pairs.SESSIONS)
def test_every_family(case, rows):
    both = pairs.pair(case)
    packed, given = optimize(copy.deepcopy(both.ours), "f32"), both.inputs(rows)
    with counted_steps() as calls:
        tokens = packed.generate(**given, **OPTIONS)
    assert calls.call_count == 7
    assert torch.equal(tokens, both.ours.generate(**given, **OPTIONS))


@pytest.mark.parametrize("each", [1, 2])
def test_images_before_the_text(each):
    model = tiny.prepend(num_image_tokens=3)
    given = tiny.texts() | {"pixel_values": tiny.images(2 * each)}
    given["attention_mask"] = torch.ones_like(given["attention_mask"])
    expected = model.generate(**given, **OPTIONS)
    with counted_steps() as calls:
        tokens = optimize(model, "f32").generate(**given, **OPTIONS)
    assert calls.call_count == 7 and torch.equal(tokens, expected)


def test_tokens_are_drawn_as_transformers_draws_them(model):
    """The first token of many rows, by a chi-square statistic."""
    ids = torch.tensor([[5, 6, 7]])
    warpers = {"do_sample": True, "top_k": 12, "top_p": 0.8, "temperature": 1.5, "min_p": 0.02}
    torch.manual_seed(0)
    drawn = model.generate(
        ids, max_new_tokens=1, pad_token_id=0, num_return_sequences=4000, **warpers
    )[:, -1]
    scores = model.generate(
        ids, max_new_tokens=1, pad_token_id=0, output_scores=True, return_dict_in_generate=True,
        **warpers,
    ).scores[0][0]  # fmt: skip
    expected = scores.softmax(-1) * 4000
    counts = torch.bincount(drawn, minlength=len(expected))
    kept = expected > 0
    assert not counts[~kept].any() and 2 < kept.sum() <= 12
    statistic = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert statistic < 35  # 11 degrees of freedom: once in 4,000 seeds


def test_a_streamer_gets_every_token(model):
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer, ids = Streamer(), torch.tensor([[5, 6, 7]])
    tokens = model.generate(ids, streamer=streamer, **OPTIONS)
    assert streamer.tokens == tokens[0].tolist() and streamer.ended


def test_other_ways_are_those_of_transformers(model, caplog):
    with caplog.at_level("DEBUG", logger="mllama"):
        model.generate(torch.tensor([[5, 6, 7]]), **OPTIONS, return_dict_in_generate=True)
    assert "select_token" in caplog.text


def negated(model):
    """The model's class with a forward that changes the logits."""

    class Negated(type(model)):
        @functools.wraps(type(model).forward)
        def forward(self, *args, **kwargs):
            output = super().forward(*args, **kwargs)
            output.logits = -output.logits
            return output

    return Negated


def test_a_subclass_runs_its_own_forward(model):
    other = copy.deepcopy(model)
    other.__class__ = negated(model)
    tokens = other.generate(**inputs(), **OPTIONS)
    hooked = copy.deepcopy(model)
    hooked.lm_head.register_forward_hook(lambda module, args, output: -output)
    assert torch.equal(tokens, hooked.generate(**inputs(), **OPTIONS))
    assert not torch.equal(tokens, model.generate(**inputs(), **OPTIONS))


def test_scores(model):
    def generate():
        more = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True}
        return model.generate(**inputs(), **OPTIONS, **more)

    for given, expected in zip(generate().scores, by_layers(model, generate).scores, strict=True):
        torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"cache_implementation": "static"}, "StaticLayer"),
        ({"use_cache": False}, None),
        ({"output_attentions": True, "return_dict_in_generate": True}, "attentions"),
        ({"num_beams": 6}, "rows"),  # 18 rows
    ],
    ids=str,
)
def test_what_runs_by_the_layers(model, options, reason, caplog):
    with caplog.at_level("DEBUG", logger="mllama"), counted_steps() as calls:
        model.generate(**inputs(), **OPTIONS | options)
    assert calls.call_count == 0
    assert reason is None or reason in caplog.text


def sizes_of(calls) -> list[int]:
    """Positions of the passes of `counted_steps`."""
    return [call.args[1].embeds.shape[1] for call in calls.call_args_list]


@pytest.mark.parametrize("weights", ["f32", "int4"])
@pytest.mark.parametrize("case", [*pairs.TEXTS, "llava, clip, -2", "paligemma, gemma2", "mllama"])
def test_drafts_are_verified_by_decode_step(case, weights):
    both = pairs.pair(case)
    packed, given = optimize(copy.deepcopy(both.ours), weights), both.inputs("one row")
    options = OPTIONS | {"max_new_tokens": 20}
    greedy = packed.generate(**given, **options)
    lookup = {"prompt_lookup_num_tokens": 5, "max_matching_ngram_size": 1}
    with layer_by_layer(packed) if weights == "f32" else contextlib.nullcontext():
        expected = packed.generate(**given, **options, **lookup)
    with counted_steps() as calls:
        assert torch.equal(packed.generate(**given, **options, **lookup), greedy)
    assert torch.equal(expected, greedy) and max(sizes_of(calls)) > 1


def test_assistants():
    model = optimize(copy.deepcopy(pairs.pair("llama").ours), "int4")
    assistant = optimize(pairs.make("llama", seed=1).ours, "f32")
    one, options = torch.tensor([tiny.tokens(4) * 3]), OPTIONS | {"pad_token_id": 97}
    greedy = model.generate(one, **options)
    for other in (copy.deepcopy(model), assistant):
        other.generation_config.update(
            assistant_confidence_threshold=0.0,
            num_assistant_tokens=3,
            num_assistant_tokens_schedule="constant",
        )
        with counted_steps() as calls:
            assert torch.equal(model.generate(one, **options, assistant_model=other), greedy)
        assert max(sizes_of(calls)) > 2


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("case", ["llama", "gemma"])
def test_drafts_after_a_cache(case, masked):
    """The first pass is of what is new, though transformers names no length for it."""
    model = optimize(copy.deepcopy(pairs.pair(case).ours), "f32")
    first = torch.tensor([[0] * masked + tiny.tokens(9) * 2])
    for drafting in ({"prompt_lookup_num_tokens": 3}, {"assistant_model": copy.deepcopy(model)}):
        answers = []
        for more in ({}, drafting):
            cache = DynamicCache()
            mask = (torch.arange(first.shape[1]) >= masked).long()[None]
            given = {"past_key_values": cache, "attention_mask": mask}
            answer = model.generate(first, **OPTIONS, **given)
            longer = torch.cat([answer, torch.tensor([[44, 45]])], 1)
            count = longer.shape[1] - first.shape[1]
            given["attention_mask"] = torch.nn.functional.pad(mask, (0, count), value=1)
            answers.append(model.generate(longer, **OPTIONS, **given, **more))
        assert torch.equal(*answers)
        with pytest.raises(ValueError, match="input_ids"):  # the cache's own are not there
            model.generate(longer[:, -2:], **OPTIONS, **given, **drafting)


def test_drafts_beyond_sixteen_run_by_the_layers(model):
    one = torch.tensor([[5, 6, 7] * 9])
    options = OPTIONS | {"max_new_tokens": 30, "prompt_lookup_num_tokens": 20}
    greedy = model.generate(one, **OPTIONS | {"max_new_tokens": 30})
    with counted_steps() as calls:
        assert torch.equal(model.generate(one, **options), greedy)
    assert max(sizes_of(calls)) <= 16


def test_rejected_drafts_are_written_over_in_the_same_buffers(model):
    """And after `generate`, views of the cache that was given stay as they are again."""
    cache, one = DynamicCache(config=model.config), torch.tensor([tiny.tokens(4) * 3])
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    with mock.patch("mllama.hf.cache._with_room", wraps=_with_room) as copies:
        model.generate(one, past_key_values=cache, **OPTIONS | {"max_new_tokens": 30}, **lookup)
    assert copies.call_count <= 2 * 2 * len(cache.layers)  # at first, and where there is no room
    assert not hasattr(cache, "rewinds")
    saved = [layer.keys for layer in cache.layers]
    copied = [keys.clone() for keys in saved]
    cache.crop(-3)
    follow(model, cache, torch.tensor([[9]]))
    assert all(map(torch.equal, saved, copied))


def follow(model, cache, ids, steps=3):
    """Logits of greedy steps after a prompt."""
    logits = []
    for _ in range(steps):
        output = model(ids, past_key_values=cache)
        logits.append(output.logits[:, -1].float())
        ids = logits[-1].argmax(-1, keepdim=True)
    return torch.stack(logits)


@pytest.mark.parametrize(
    "change",
    [
        lambda cache: cache,
        copy.deepcopy,
        lambda cache: pickle.loads(pickle.dumps(cache)),
        lambda cache: cache.crop(-2) or cache,
        lambda cache: cache.reorder_cache(torch.tensor([1, 0])) or cache,
        lambda cache: cache.batch_repeat_interleave(2) or cache,
        lambda cache: cache.batch_select_indices(torch.tensor([1])) or cache,
    ],
    ids=["same", "deepcopy", "pickle", "crop", "reorder", "repeat", "select"],
)
@torch.no_grad()
def test_changed_caches(model, change):
    def run():
        cache = DynamicCache(config=model.config)
        follow(model, cache, torch.tensor([[5, 6, 7], [8, 9, 3]]))
        other = change(cache)
        ids = torch.full((len(other.layers[0].keys), 1), 4)
        logits = follow(model, other, ids)
        return torch.cat([logits.flatten(), follow(model, cache, ids).flatten()])

    torch.testing.assert_close(run(), by_layers(model, run), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_saved_views_of_a_cache_stay_as_they_are(model):
    cache = DynamicCache(config=model.config)
    follow(model, cache, torch.tensor([[5, 6, 7]]))
    assert isinstance(cache.layers[0], GrowingCacheLayer)
    saved = [(layer.keys, layer.values) for layer in cache.layers]
    copies = [keys.clone() for keys, _ in saved]
    cache.crop(-3)
    follow(model, cache, torch.tensor([[9]]))
    for (keys, _), expected in zip(saved, copies, strict=True):
        assert torch.equal(keys, expected)


@torch.no_grad()
def test_given_embeddings_stay_as_they_are(model):
    cache = DynamicCache(config=model.config)
    model(torch.tensor([[5, 6, 7]]), past_key_values=cache)
    embeds = model.get_input_embeddings()(torch.tensor([[4]]))
    before = embeds.clone()
    with counted_steps() as calls:
        model(inputs_embeds=embeds, past_key_values=cache)
    assert calls.call_count == 1 and torch.equal(embeds, before)


@torch.no_grad()
def test_a_static_cache_given_to_forward(model):
    static, dynamic = (
        StaticCache(config=model.config, max_cache_len=16),
        DynamicCache(config=model.config),
    )
    given, expected = (follow(model, one, torch.tensor([[5, 6, 7]])) for one in (static, dynamic))
    torch.testing.assert_close(given, expected, atol=1e-5, rtol=1e-5)
