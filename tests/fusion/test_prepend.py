"""Visual tokens before the text: the same as by hand with stock transformers' modules, however it
is asked for.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import DynamicCache, StaticCache

import tiny
from fusion.by_hand import ByHand, same_gradients
from mllama import MllamaForConditionalGeneration

GREEDY = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
CASES = {
    "one token": {"num_image_tokens": 1},
    "three": {"num_image_tokens": 3, "projector": "linear"},
    "as many as patches": {},
    "learned": {"num_image_tokens": 2, "image_pooling": "learned"},
    "learned, as many as patches": {"image_pooling": "learned", "projector": "linear"},
}


@pytest.mark.parametrize(("each", "side"), [(1, "left"), (2, "left"), (2, "right")])
@pytest.mark.parametrize("case", CASES)
def test_logits_equal_those_by_hand(case, each, side):
    model = tiny.prepend(**CASES[case])
    inputs = tiny.texts(side) | {"pixel_values": tiny.images(2 * each)}
    with torch.no_grad():
        given = ByHand(model).prepended(**inputs)
        seen = given["attention_mask"].bool()
        got = model(**inputs)
        tiny.close(got.logits[seen], ByHand(model).text(**given).logits[seen])
        assert got.logits.shape[1] == each * model.config.num_image_tokens + 7
        tiny.close(got.image_hidden_states, ByHand(model).visual(inputs["pixel_values"]))
        features = model.get_image_features(inputs.pop("pixel_values"))
        assert torch.equal(model(**inputs, image_features=features).logits, got.logits)


def test_a_mask_of_any_type():
    model, inputs = (
        tiny.prepend(num_image_tokens=3),
        tiny.texts() | {"pixel_values": tiny.images(2)},
    )
    mask = inputs.pop("attention_mask")
    with torch.no_grad():
        expected = model(**inputs, attention_mask=mask).logits
        assert all(
            torch.equal(model(**inputs, attention_mask=mask.to(kind)).logits, expected)
            for kind in (torch.bool, torch.float32)
        )


@pytest.mark.parametrize("case", CASES)
def test_loss_and_every_gradient_equal_those_by_hand(case):
    model = tiny.prepend(**CASES[case])
    oracle, inputs = ByHand(model), tiny.texts() | {"pixel_values": tiny.images(2)}
    labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
    loss = model(**inputs, labels=labels).loss
    logits = oracle.text(**oracle.prepended(**inputs)).logits[
        :, -8:-1
    ]  # the last visual token's are for the first word
    labels[1, 3] = -100  # before which there is padding here
    expected = cross_entropy(logits.flatten(0, 1), labels.flatten())
    torch.testing.assert_close(loss, expected)
    loss.backward()
    expected.backward()
    same_gradients(model, oracle)


def test_as_many_tokens_as_patches_are_a_merge():
    merged = tiny.model(vision_feature="last")
    model = tiny.prepend()
    inputs = tiny.texts("right") | {"pixel_values": tiny.images(2)}
    placeholders = torch.full((2, tiny.PATCHES), tiny.IMAGE)
    with torch.no_grad():
        expected = merged(
            torch.cat([placeholders, inputs["input_ids"]], 1),
            inputs["pixel_values"],
            torch.cat([torch.ones_like(placeholders), inputs["attention_mask"]], 1),
        ).logits
        torch.testing.assert_close(model(**inputs).logits, expected)


@pytest.mark.parametrize("side", ["left", "right"])
def test_placeholders_say_the_same_and_more(side):
    """Text alone and placeholders in front of it are one; with them rows may have several images,
    or none.
    """
    model, image = tiny.prepend(num_image_tokens=3, image_token_index=tiny.IMAGE), [tiny.IMAGE] * 3
    words = tiny.tokens(7), tiny.tokens(4, 5)
    plain = tiny.batch(*words, side=side) | {"pixel_values": tiny.images(2)}
    written = tiny.batch(*(image + row for row in words), side=side) | {
        "pixel_values": tiny.images(2)
    }
    mixed = tiny.batch(words[0], image + image + words[1], side=side) | {
        "pixel_values": tiny.images(2)
    }
    with torch.no_grad():
        got, expected = model(**plain).logits[:, 3:], model(**written).logits
        for row, length in enumerate((7, 4)):
            one = got[row, -length:] if side == "left" else got[row, :length]
            tiny.close(
                one, expected[row, -length:] if side == "left" else expected[row, 3 : 3 + length]
            )
        logits = model(**mixed).logits
        seen = mixed["attention_mask"].bool()
        tiny.close(logits[0][seen[0]], model(**tiny.batch(words[0])).logits[0])
        tiny.close(
            logits[1][seen[1]], model(**tiny.batch(words[1]), pixel_values=tiny.images(2)).logits[0]
        )
    assert torch.equal(
        model.generate(**plain, **GREEDY)[:, 7:], model.generate(**written, **GREEDY)[:, -6:]
    ) is (side == "left")


@pytest.mark.parametrize(
    "options",
    [GREEDY, GREEDY | {"num_beams": 3, "num_return_sequences": 2}],
    ids=["greedy", "beams"],
)
@pytest.mark.parametrize("each", [1, 2])
def test_what_is_generated_equals_what_is_by_hand(each, options):
    model = tiny.prepend(num_image_tokens=3)
    inputs = tiny.texts() | {"pixel_values": tiny.images(2 * each)}
    with torch.no_grad():
        given = ByHand(model).prepended(**inputs)
        expected = ByHand(model).text.generate(
            inputs_embeds=given["inputs_embeds"], attention_mask=given["attention_mask"], **options
        )
    got = model.generate(**inputs, **options)
    assert torch.equal(
        got[:, :7], inputs["input_ids"].repeat_interleave(options.get("num_return_sequences", 1), 0)
    )
    assert torch.equal(got[:, 7:], expected)
    for more in (
        {"use_cache": False},
        {"cache_implementation": "static"},
        {"past_key_values": DynamicCache(config=model.config)},
    ):
        assert torch.equal(model.generate(**inputs, **options, **more), got), more
    assert torch.equal(
        model.generate(**inputs, **options | {"max_new_tokens": None, "max_length": 13}), got
    )


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_token_by_token(kind, masked):
    model = tiny.prepend(num_image_tokens=3)
    inputs = tiny.texts() if masked else {"input_ids": tiny.texts()["input_ids"]}
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    cache = kind(config=model.config, **{"max_cache_len": 12} if kind is StaticCache else {})
    with torch.no_grad():
        whole = model(**inputs, pixel_values=tiny.images(2)).logits
        logits = []
        for start, end in ((0, 4), (4, 5), (5, 7)):
            rest = (
                {"pixel_values": tiny.images(2)} if start != 5 else {}
            )  # given again, they change nothing
            rest |= {} if mask is None else {"attention_mask": mask[:, :end]}
            logits.append(model(ids[:, start:end], **rest, past_key_values=cache).logits)
        seen = (
            torch.ones(2, 10, dtype=torch.bool)
            if mask is None
            else torch.cat([torch.ones(2, 3), mask], 1).bool()
        )
        tiny.close(torch.cat(logits, 1)[seen], whole[seen])
        if kind is StaticCache:  # the next text of a cache that was emptied has no images
            cache.reset()
            tiny.close(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_a_second_turn_goes_on_from_the_cache():
    model, inputs = (
        tiny.prepend(num_image_tokens=3),
        tiny.texts() | {"pixel_values": tiny.images(2)},
    )
    cache = DynamicCache()
    first = model.generate(**inputs, **GREEDY, past_key_values=cache)
    follow = torch.cat([first, torch.tensor([tiny.tokens(3, 8), tiny.tokens(3, 9)])], 1)
    mask = torch.cat([inputs["attention_mask"], torch.ones(2, 9, dtype=torch.long)], 1)
    fresh = model.generate(
        follow, pixel_values=inputs["pixel_values"], attention_mask=mask, **GREEDY
    )
    assert torch.equal(
        model.generate(follow, attention_mask=mask, past_key_values=cache, **GREEDY), fresh
    )


def test_positions_are_the_texts():
    model, inputs = (
        tiny.prepend(num_image_tokens=3),
        tiny.texts("right") | {"pixel_values": tiny.images(2)},
    )
    with torch.no_grad():
        seen = torch.cat([torch.ones(2, 3), inputs["attention_mask"]], 1).bool()
        got = model(**inputs, position_ids=torch.arange(7)[None]).logits
        tiny.close(got[seen], model(**inputs).logits[seen])


def test_text_alone_is_the_text_models():
    model = tiny.prepend(num_image_tokens=3)
    with torch.no_grad():
        assert torch.equal(
            model(**tiny.texts()).logits, tiny.model(vision_feature="last")(**tiny.texts()).logits
        )


def test_compile():
    small = {
        "text": {"num_hidden_layers": 1},
        "vision": {"num_hidden_layers": 1},
        "num_image_tokens": 3,
    }
    model, inputs = tiny.prepend(**small), tiny.texts() | {"pixel_values": tiny.images(2)}
    with torch.no_grad():
        expected = model(**inputs).logits
        tiny.close(
            torch.compile(model, backend="eager", fullgraph=True)(**inputs, use_cache=False).logits,
            expected,
        )
        written = tiny.prepend(
            **small, image_token_index=tiny.IMAGE
        )  # whether there are placeholders breaks the graph
        tiny.close(
            torch.compile(written, backend="eager")(**inputs, use_cache=False).logits, expected
        )


@pytest.mark.parametrize("case", ["three", "learned"])
def test_files_keep_it(case, tmp_path):
    model, inputs = tiny.prepend(**CASES[case]), tiny.texts() | {"pixel_values": tiny.images(2)}
    model.save_pretrained(tmp_path)
    read = MllamaForConditionalGeneration.from_pretrained(tmp_path)
    for name in ("fusion", "num_image_tokens", "image_pooling", "cross_attention_every"):
        assert getattr(read.config, name) == getattr(model.config, name)
    with torch.no_grad():
        assert torch.equal(read(**inputs).logits, model(**inputs).logits)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"fusion": "prepended"}, "fusion"),
        ({"num_image_tokens": 0}, "num_image_tokens"),
        ({"num_image_tokens": 5}, "num_image_tokens"),
        ({"num_image_tokens": 1.0}, "num_image_tokens"),
        ({"image_pooling": "max"}, "image_pooling"),
        ({"cross_attention_every": 1}, "cross_attention_every"),
        ({"fusion": "merge", "num_image_tokens": 4}, "num_image_tokens"),
        ({"fusion": "cross_attention", "image_pooling": "average"}, "image_pooling"),
    ],
)
def test_configs_that_cannot_be_are_refused(options, named):
    with pytest.raises(ValueError, match=named):
        tiny.config(**{"fusion": "prepend"} | options)


def test_calls_that_cannot_be_are_refused():
    model, inputs = tiny.prepend(num_image_tokens=3), tiny.texts()
    ids, cache = inputs["input_ids"], DynamicCache()
    with pytest.raises(ValueError, match="3 for 2 rows"):
        model(**inputs, pixel_values=tiny.images(3))
    with pytest.raises(ValueError, match="3 for 2 rows"):
        model.generate(**inputs, pixel_values=tiny.images(3), num_beams=2)
    longer = torch.ones(2, 10, dtype=torch.long)  # as the text with its visual tokens
    for name, wrong in (
        ("attention_mask", longer),
        ("position_ids", torch.arange(6)[None]),
        ("labels", longer),
    ):
        with pytest.raises(ValueError, match=rf"{name}.*{wrong.shape[1]}\]"):
            model(ids, tiny.images(2), **{name: wrong})
    with pytest.raises(TypeError, match="labels"):
        model(ids, tiny.images(2), labels=ids.tolist())
    with pytest.raises(ValueError, match="prefill_chunk_size"):
        model.generate(**inputs, pixel_values=tiny.images(2), prefill_chunk_size=2)
    with pytest.raises(ValueError, match="input_ids"):
        model.generate(ids[:1], pixel_values=tiny.images(1), prompt_lookup_num_tokens=2)
    model(ids, tiny.images(2), past_key_values=cache)
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids[:, :1], attention_mask=torch.ones(2, 11), past_key_values=cache)
    with pytest.raises(ValueError, match="holds text, and 3 visual tokens before it"):
        model(ids[:, :1], tiny.images(4), past_key_values=cache)
    model(ids, past_key_values=(cache := DynamicCache()))
    with pytest.raises(ValueError, match="holds text, and 0 visual tokens before it"):
        model(ids[:, :1], tiny.images(2), past_key_values=cache)


def test_prompt_lookup_with_placeholders_equals_greedy():
    model, image = tiny.prepend(num_image_tokens=3, image_token_index=tiny.IMAGE), [tiny.IMAGE] * 3
    inputs = tiny.batch(image + tiny.tokens(6)) | {"pixel_values": tiny.images(1)}
    assert torch.equal(
        model.generate(**inputs, **GREEDY, prompt_lookup_num_tokens=2),
        model.generate(**inputs, **GREEDY),
    )
