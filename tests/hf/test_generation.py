"""generate(): every way of choosing tokens gives what the twin gives, and caches, padding and
batches change nothing.
"""

import pytest
import torch
from transformers import DynamicCache, StaticCache, TextStreamer

import tiny

IMAGE = [tiny.IMAGE] * tiny.PATCHES
ROWS = [IMAGE + tiny.tokens(6), tiny.tokens(4, 7), tiny.tokens(3) + IMAGE + IMAGE + tiny.tokens(2)]
GREEDY = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}


def inputs() -> dict[str, torch.Tensor]:
    return tiny.batch(*ROWS) | {"pixel_values": tiny.images(3)}


@pytest.fixture(scope="module")
def model():
    return tiny.model()


@pytest.fixture(scope="module")
def greedy(model) -> torch.Tensor:
    return model.generate(**inputs(), **GREEDY)


def test_greedy_equals_the_twins(model, greedy):
    assert torch.equal(greedy, tiny.twin(model).generate(**inputs(), **GREEDY))
    assert (greedy[:, -8:] != greedy[:, -8:-7]).any()  # not one token over and over


def test_caches_change_nothing(model, greedy):
    static = StaticCache(config=model.config, max_cache_len=40)  # longer than it needs to be
    for options in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"past_key_values": static},
        {"past_key_values": DynamicCache(config=model.config)},
    ):
        assert torch.equal(model.generate(**inputs(), **GREEDY, **options), greedy), options


def test_a_static_caches_logits_equal_a_dynamic_ones(model):
    batch = inputs()
    static, dynamic = (
        StaticCache(config=model.config, max_cache_len=24),
        DynamicCache(config=model.config),
    )
    mask = batch["attention_mask"]
    with torch.no_grad():
        for cache in (static, dynamic):
            model(**batch, past_key_values=cache)
        for step in range(3):
            mask = torch.cat([mask, mask.new_ones(3, 1)], dim=1)
            ids = torch.full((3, 1), 5 + step)
            static_logits = model(ids, attention_mask=mask, past_key_values=static).logits
            torch.testing.assert_close(
                static_logits, model(ids, attention_mask=mask, past_key_values=dynamic).logits
            )
        unmasked = model(
            ids, past_key_values=static
        ).logits  # without a mask every slot filled so far is seen
        torch.testing.assert_close(unmasked, model(ids, past_key_values=dynamic).logits)


def test_batched_equals_single(model, greedy):
    for index, (row, images) in enumerate(zip(ROWS, ((0, 1), (1, 1), (1, 3)), strict=True)):
        pixels = tiny.images(3)[slice(*images)]
        single = model.generate(
            **tiny.batch(row), pixel_values=pixels if len(pixels) else None, **GREEDY
        )
        assert torch.equal(single[0, -8:], greedy[index, -8:])


def test_the_placeholder_need_not_be_known(model, greedy):
    told = tiny.model(image_token_index=None)
    assert torch.equal(told.generate(**inputs(), **GREEDY), greedy)


def test_beam_search_equals_the_twins_where_a_row_has_one_image(model):
    batch = tiny.batch(ROWS[0], IMAGE + tiny.tokens(3)) | {"pixel_values": tiny.images(2)}
    options = GREEDY | {"num_beams": 3, "num_return_sequences": 2}
    assert torch.equal(
        model.generate(**batch, **options), tiny.twin(model).generate(**batch, **options)
    )


def test_beams_of_rows_with_several_images_equal_single_rows(model):
    """transformers repeats the images one by one, which mixes up the rows that have several; here
    they follow their rows.
    """
    options = GREEDY | {"num_beams": 3, "length_penalty": 0.0}
    batched = model.generate(**inputs(), **options)
    for index, (row, images) in enumerate(zip(ROWS, ((0, 1), (1, 1), (1, 3)), strict=True)):
        pixels = tiny.images(3)[slice(*images)]
        single = model.generate(
            **tiny.batch(row), pixel_values=pixels if len(pixels) else None, **options
        )
        assert torch.equal(single[0, -8:], batched[index, -8:])


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7, "top_k": 5},
        {"top_p": 0.8, "top_k": 0},
        {"min_p": 0.2, "top_k": 0, "temperature": 1.5},
    ],
    ids=["top-k", "top-p", "min-p"],
)
def test_sampling_equals_the_twins(model, options):
    drawn = []
    for sampler in (model, tiny.twin(model)):
        torch.manual_seed(0)
        drawn.append(sampler.generate(**inputs(), **GREEDY | {"do_sample": True}, **options))
    assert torch.equal(*drawn)


def test_several_answers_per_prompt(model, greedy):
    torch.manual_seed(0)
    answers = model.generate(
        **inputs(), **GREEDY | {"do_sample": True, "top_k": 1}, num_return_sequences=2
    )
    assert torch.equal(answers, greedy.repeat_interleave(2, dim=0))


def test_streaming(model):
    class Collector(TextStreamer):
        def __init__(self):
            self.pieces, self.ended = [], False

        def put(self, value):
            self.pieces.append(value)

        def end(self):
            self.ended = True

    streamer = Collector()
    single = model.generate(
        **tiny.batch(ROWS[0]), pixel_values=tiny.images(1), streamer=streamer, **GREEDY
    )
    assert streamer.ended and torch.equal(
        torch.cat([piece.flatten() for piece in streamer.pieces]), single[0]
    )


def test_inputs_embeds(model):
    batch = tiny.batch(tiny.tokens(5), tiny.tokens(3))
    embeds = model.get_input_embeddings()(batch["input_ids"])
    from_embeds = model.generate(
        inputs_embeds=embeds, attention_mask=batch["attention_mask"], **GREEDY
    )
    assert torch.equal(from_embeds, model.generate(**batch, **GREEDY)[:, -8:])


def test_features_computed_before(model, greedy):
    batch = inputs()
    features = model.get_image_features(batch.pop("pixel_values"))
    for options in ({}, {"use_cache": False}):
        assert torch.equal(
            model.generate(**batch, image_features=features, **GREEDY, **options), greedy
        )


def test_images_are_encoded_once(model, monkeypatch):
    calls = []
    forward = model.vision_tower.forward
    monkeypatch.setattr(
        model.vision_tower,
        "forward",
        lambda *args, **kwargs: calls.append(args[0].shape[0]) or forward(*args, **kwargs),
    )
    model.generate(**inputs(), **GREEDY)
    assert calls == [3]
    model.generate(**inputs(), **GREEDY, num_beams=3)
    assert calls == [3, 3]


def test_going_on_from_a_cache(model):
    """A second question, with an image of its own, about a conversation that is already in the
    cache.
    """
    first = tiny.batch(ROWS[0])
    pixels = tiny.images(2)
    cache = DynamicCache(config=model.config)
    start = model.generate(**first, pixel_values=pixels[:1], past_key_values=cache, **GREEDY)
    follow = torch.cat(
        [start, torch.tensor([tiny.tokens(2, 3) + IMAGE + tiny.tokens(3, 4)])], dim=1
    )
    ones = torch.ones_like(follow)
    fresh = model.generate(input_ids=follow, attention_mask=ones, pixel_values=pixels, **GREEDY)
    cached = model.generate(
        input_ids=follow,
        attention_mask=ones,
        pixel_values=pixels[1:],
        past_key_values=cache,
        **GREEDY,
    )
    assert torch.equal(cached, fresh)


def test_assisted_decoding_equals_greedy_and_its_assistant_sees_the_image(model):
    batch = tiny.batch(ROWS[0]) | {"pixel_values": tiny.images(1)}
    assistant, seen = tiny.model(), []
    assistant.vision_tower.register_forward_hook(lambda *_: seen.append(1))
    assert torch.equal(
        model.generate(**batch, **GREEDY, assistant_model=assistant),
        model.generate(**batch, **GREEDY),
    )
    assert len(seen) == 1


def test_prompt_lookup_equals_greedy(model):
    batch = tiny.batch(ROWS[0]) | {"pixel_values": tiny.images(1)}
    assert torch.equal(
        model.generate(**batch, **GREEDY, prompt_lookup_num_tokens=3),
        model.generate(**batch, **GREEDY),
    )


def test_scores_and_attentions_of_every_step(model):
    batch = tiny.batch(ROWS[0]) | {"pixel_values": tiny.images(1)}
    output = model.generate(
        **batch, **GREEDY, return_dict_in_generate=True, output_logits=True, output_attentions=True
    )
    assert len(output.logits) == 8 and output.logits[0].shape == (1, tiny.VOCAB_SIZE)
    assert output.attentions[0][0].shape == (1, 4, 10, 10) and output.attentions[1][0].shape == (
        1,
        4,
        1,
        11,
    )


def test_an_image_without_placeholders_is_refused(model):
    with pytest.raises(ValueError, match="placeholders"):
        model.generate(**tiny.batch(tiny.tokens(4)), pixel_values=tiny.images(1), **GREEDY)


def test_stop_strings_need_the_tokenizer_and_stop_where_the_twin_does(make_tokenizer):
    tokenizer = make_tokenizer()
    model = tiny.model(text={"vocab_size": len(tokenizer) + 1}, image_token_index=len(tokenizer))
    prompt = tokenizer("two red three blue", return_tensors="pt", return_token_type_ids=False)
    free = model.generate(**prompt, **GREEDY)
    stop = {"stop_strings": [tokenizer.decode(free[0, -5])], "tokenizer": tokenizer}
    stopped = model.generate(**prompt, **GREEDY, **stop)
    assert prompt["input_ids"].shape[1] < stopped.shape[1] < free.shape[1]
    assert torch.equal(stopped, tiny.twin(model).generate(**prompt, **GREEDY, **stop))
