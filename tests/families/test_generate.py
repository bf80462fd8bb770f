"""generate() of every family: stock transformers' tokens, however they are chosen, and caches,
padding and turns that change nothing.
"""

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextIteratorStreamer

import tiny
from mllama import MllamaForConditionalGeneration
from tiny import IMAGE, close, stock, tokens
from tiny.pairs import LANGUAGE, MIXED, MODELS_AND_ROWS, ONE_EACH, make, pair, with_inputs

GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


@pytest.mark.parametrize(("case", "rows"), MODELS_AND_ROWS)
def test_greedy(case, rows):
    both = pair(case)
    batch = both.inputs(rows)
    ours, theirs = (model.generate(**batch, **GREEDY) for model in both)
    assert torch.equal(ours, theirs)
    end = ours[0, -4].item()  # a row that stops early is padded
    ours, theirs = (model.generate(**batch, **GREEDY | {"eos_token_id": end}) for model in both)
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize(
    "options",
    [
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True},
        {"do_sample": True, "num_return_sequences": 2, "temperature": 0.7, "top_k": 7},
        {"do_sample": True, "top_p": 0.8, "repetition_penalty": 1.3},
    ],
    ids=["beams", "beams by chance", "several answers", "by chance"],
)
@pytest.mark.parametrize("case", ONE_EACH)
def test_other_ways_of_choosing(case, options):
    both, drawn = pair(case), []
    for model in both:
        torch.manual_seed(0)
        drawn.append(model.generate(**both.inputs(), **GREEDY | options))
    assert torch.equal(*drawn)


@pytest.mark.parametrize("case", ONE_EACH)
def test_caches_change_nothing(case):
    model = pair(case).ours
    batch = pair(case).inputs(MIXED)
    expected = model.generate(**batch, **GREEDY)
    for options in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"past_key_values": StaticCache(config=model.config, max_cache_len=100)},
        {"past_key_values": DynamicCache(config=model.config)},
        {
            "cache_implementation": "static",
            "num_beams": 2,
            "length_penalty": 0.0,
            "early_stopping": True,
        },
    ):
        if "num_beams" in options:
            expected = model.generate(**batch, **GREEDY, **options | {"cache_implementation": None})
        assert torch.equal(model.generate(**batch, **GREEDY, **options), expected), options


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text"])
def test_a_static_cache_whose_layers_all_have_a_window(family):
    config = stock.make(family, layer_types=["sliding_attention"] * 2).config
    model = tiny.randomize(MllamaForConditionalGeneration(config)).eval()
    batch = tiny.batch(tokens(9), tokens(4, 5))
    for options in ({}, {"num_beams": 2}):
        expected = model.generate(**batch, **GREEDY, **options)
        options["cache_implementation"] = "static"
        assert torch.equal(model.generate(**batch, **GREEDY, **options), expected)


@pytest.mark.parametrize("case", ONE_EACH)
def test_caches_that_cannot_hold_the_answer(case):
    model, batch = make(case).ours, pair(case).inputs(MIXED)
    length = batch["input_ids"].shape[1]
    with pytest.raises(ValueError, match=f"room for {length} tokens: {length} are in it, and 1"):
        model.generate(
            **batch,
            **GREEDY,
            past_key_values=StaticCache(config=model.config, max_cache_len=length),
        )
    with pytest.raises(ValueError, match=f"room for 2 tokens: 0 are in it, and {length}"):
        model.generate(
            **batch, **GREEDY, past_key_values=StaticCache(config=model.config, max_cache_len=2)
        )
    with pytest.raises(TypeError, match="tuple"):
        model.generate(**batch, **GREEDY, past_key_values=())
    expected = model.generate(**batch, **GREEDY)
    model.train()
    model.activation_checkpointing_enable()
    with pytest.raises(ValueError, match="checkpointed"):
        model.generate(**batch, **GREEDY)
    assert torch.equal(model.generate(**batch, **GREEDY, use_cache=False), expected)


@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, DynamicCache) for case in LANGUAGE] + [(case, StaticCache) for case in ONE_EACH],
)
def test_logits_piece_by_piece(case, kind):
    """A prompt at once and the rest in two pieces give what all of it at once does."""
    both = pair(case)
    model, batch = both.ours, both.inputs((["image", 9], ["image", 6]), completion=4)
    mask, cuts = batch["attention_mask"], (0, -4, -2, None)
    cache = kind(
        config=model.config.get_text_config(),
        **{"max_cache_len": 40} if kind is StaticCache else {},
    )
    with torch.no_grad():
        whole = model(**batch).logits
        for start, end in zip(cuts, cuts[1:], strict=False):
            piece = {
                name: batch[name][:, start:end]
                for name in ("input_ids", "token_type_ids")
                if name in batch
            }
            pixels = (
                {}
                if start or "pixel_values" not in batch
                else {"pixel_values": batch["pixel_values"]}
            )
            got = model(
                **piece, **pixels, attention_mask=mask[:, :end], past_key_values=cache
            ).logits
            seen = mask[:, start:end].bool()
            close(got[seen], whole[:, start:end][seen])


@pytest.mark.parametrize(
    ("case", "beams"), [(case, 1) for case in LANGUAGE] + [(case, 2) for case in ONE_EACH]
)
def test_a_row_does_not_depend_on_its_batch(case, beams):
    """With beams too, where transformers repeats images one by one and mixes up rows that have
    several.
    """
    both, options = pair(case), GREEDY
    if beams > 1:
        options = options | {"num_beams": beams, "length_penalty": 0.0}
    whole = both.inputs(([7, "image", 3], [4], ["image", "image", 2]))
    batched = both.ours.generate(**whole, **options)
    pixels = whole.pop("pixel_values", None)
    for index, shown in enumerate((slice(0, 1), slice(1, 1), slice(1, 3))):
        seen = whole["attention_mask"][index].bool()
        single = {name: value[index : index + 1, seen] for name, value in whole.items()}
        if pixels is not None:
            single["pixel_values"] = pixels[shown]
        assert torch.equal(both.ours.generate(**single, **options)[0, -8:], batched[index, -8:])


@pytest.mark.parametrize("case", ONE_EACH)
def test_a_second_turn_goes_on_from_the_cache(case):
    """Of LLaVA with an image of its own."""
    both = pair(case)
    model = both.ours
    first = both.inputs(([3, "image", 4],) if case.startswith("llava") else (["image", 7],))
    cache = DynamicCache(config=model.config)
    start = model.generate(**first, past_key_values=cache, **GREEDY)
    second = [IMAGE] * model.spec.tokens_per_image * case.startswith("llava") + tokens(4, 11)
    follow = torch.cat([start, torch.tensor([second])], dim=1)
    batch = {"input_ids": follow, "attention_mask": torch.ones_like(follow)}
    if "token_type_ids" in first:
        said = torch.ones_like(follow)
        said[:, : first["input_ids"].shape[1]] = 0
        batch["token_type_ids"] = said
    pixels, new = first.get("pixel_values"), {}
    if case.startswith("llava"):
        pixels = torch.cat([pixels, both.images(1, seed=5)])
        new = {"pixel_values": pixels[1:]}
    whole = batch | ({} if pixels is None else {"pixel_values": pixels})
    fresh = model.generate(**whole, **GREEDY)
    assert torch.equal(fresh, both.theirs.generate(**whole, **GREEDY))
    assert torch.equal(model.generate(**batch, **new, past_key_values=cache, **GREEDY), fresh)


@pytest.mark.parametrize("case", ONE_EACH)
def test_assisted_decoding_and_prompt_lookup_equal_greedy(case):
    both = pair(case)
    batch = both.inputs("one row")
    expected = both.ours.generate(**batch, **GREEDY)
    for option in (
        {"prompt_lookup_num_tokens": 3},
        {"assistant_model": make(case).ours},
        {"assistant_model": make(case, seed=1).ours},
    ):
        assert torch.equal(both.ours.generate(**batch, **GREEDY, **option), expected), option


@pytest.mark.parametrize("case", ONE_EACH)
def test_embeddings_in_place_of_ids(case):
    both = pair(case)
    batch = both.inputs("no image")
    expected = both.ours.generate(**batch, **GREEDY)[:, -8:]
    tokens = batch.pop("input_ids")
    embeds = both.ours.get_input_embeddings()(tokens)
    assert torch.equal(embeds, both.theirs.get_input_embeddings()(tokens))  # of Gemma scaled
    assert torch.equal(both.ours.generate(inputs_embeds=embeds, **batch, **GREEDY), expected)


@pytest.mark.parametrize("case", ONE_EACH)
def test_what_every_step_returns_has_the_shapes_of_theirs(case):
    both = pair(case)
    wanted = dict.fromkeys(
        (
            "return_dict_in_generate",
            "output_logits",
            "output_scores",
            "output_hidden_states",
            "output_attentions",
        ),
        True,
    )
    ours, theirs = (model.generate(**both.inputs(), **GREEDY, **wanted) for model in both)
    assert (
        len(ours.logits) == len(ours.scores) == 8
        and ours.past_key_values.get_seq_length() == theirs.past_key_values.get_seq_length()
    )
    for mine, logits in zip(ours.logits, theirs.logits, strict=True):
        torch.testing.assert_close(mine, logits, rtol=1e-3, atol=1e-3)

    def shapes(steps) -> list:
        return [[layer.shape for layer in step] for step in steps]

    assert shapes(ours.hidden_states) == shapes(theirs.hidden_states)
    batch, heads = ours.attentions[0][0].shape[:2]
    length = both.inputs()["input_ids"].shape[1]
    for step, layers in enumerate(ours.attentions):
        queries = length if step == 0 else 1
        assert {tuple(layer.shape) for layer in layers} == {(batch, heads, queries, length + step)}


@pytest.mark.parametrize("case", ONE_EACH)
def test_text_is_streamed(case, make_tokenizer):
    both, tokenizer = pair(case), make_tokenizer()
    batch = both.inputs("one row")
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True)
    answer = both.ours.generate(**batch, **GREEDY, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(answer[0, batch["input_ids"].shape[1] :])


@pytest.mark.parametrize("case", ["llama", "gemma", "llava, clip, -2"])
def test_a_prompt_read_in_chunks(case):
    both = pair(case)
    batch = both.inputs("no image")
    expected = both.ours.generate(**batch, **GREEDY)
    assert torch.equal(both.ours.generate(**batch, **GREEDY, prefill_chunk_size=4), expected)


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=["pixels", "features"])
@pytest.mark.parametrize("case", ["llava, clip, -2", "paligemma"])
def test_images_are_not_read_in_chunks(case, options):
    both = pair(case)
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        both.ours.generate(**both.inputs(), **GREEDY | options, prefill_chunk_size=4)


def test_without_token_types_all_of_the_prompt_is_seen_both_ways():
    both = pair("paligemma")
    for rows in ("one row", MIXED):
        batch = both.inputs(rows)
        expected = both.ours.generate(**batch, **GREEDY)
        del batch["token_type_ids"]
        assert torch.equal(both.ours.generate(**batch, **GREEDY), expected)


@pytest.mark.parametrize("case", ["paligemma", "paligemma, odd sizes"])
def test_an_answer_that_was_begun(case):
    both = pair(case)
    batch = both.inputs(completion=2)
    expected = both.theirs.generate(**batch, **GREEDY)
    assert torch.equal(both.ours.generate(**batch, **GREEDY), expected)
    prefix = (batch.pop("token_type_ids") == 0).sum(1)
    assert torch.equal(both.ours.generate(**batch, **GREEDY, prefix_length=prefix), expected)
    single = {name: value[:1] for name, value in batch.items()} | {"prefix_length": prefix[:1]}
    assert torch.equal(
        both.ours.generate(**single, **GREEDY, assistant_model=make(case, seed=1).ours),
        expected[:1],
    )


def test_a_prompt_seen_both_ways_is_not_read_in_chunks():
    both = pair("paligemma")
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        both.ours.generate(**both.inputs("no image"), **GREEDY, prefill_chunk_size=4)


@pytest.mark.parametrize(
    ("family", "text"), [("llava, clip, -2", "llama"), ("paligemma", "gemma"), ("mllama", "llama")]
)
def test_an_assistant_that_sees_no_images(family, text):
    """Ours or transformers', it guesses from the text alone: what is said is what greedy search
    says.
    """
    both, given = with_inputs(family)
    given = {name: value[:1] for name, value in given.items()}
    how = {"max_new_tokens": 8, "do_sample": False}
    expected = both.theirs.generate(**given, **how)
    for assistant in pair(text):
        assert torch.equal(both.ours.generate(**given, **how, assistant_model=assistant), expected)
