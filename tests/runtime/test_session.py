"""Session against transformers' generate and against whole forward passes, for every family."""

import pytest
import torch

import tiny
from mllama.runtime.session import Session
from tiny import pairs

LENGTH = 8
GREEDY = {"max_new_tokens": LENGTH, "do_sample": False, "pad_token_id": 0}


def tokens(session: Session, inputs: dict, **options) -> list[list[int]]:
    options = {"max_new_tokens": LENGTH} | options
    return [row.token_ids for row in session.generate(inputs, **options).completions]


def generated(model, inputs: dict, **options) -> list[list[int]]:
    """transformers' tokens, without what stands after the end."""
    length, end = inputs["input_ids"].shape[1], options.get("eos_token_id")
    rows = model.generate(**inputs, **GREEDY | options)[:, length:].tolist()
    return [row[: row.index(end) + 1] if end in row else row for row in rows]


def by_whole_passes(model, inputs: dict) -> list[list[int]]:
    """Greedy tokens of passes over all of the text, without a cache."""
    inputs, start = dict(inputs), inputs["input_ids"].shape[1]
    with torch.no_grad():
        for _ in range(LENGTH):
            output = model(**inputs, use_cache=False, logits_to_keep=1, prompt_length=start)
            new = output.logits[:, -1:].argmax(-1)
            inputs["input_ids"] = torch.cat([inputs["input_ids"], new], 1)
            for name, value in (("attention_mask", 1), ("token_type_ids", 1)):
                if name in inputs:
                    inputs[name] = torch.nn.functional.pad(inputs[name], (0, 1), value=value)
    return inputs["input_ids"][:, start:].tolist()


def check(model, inputs: dict) -> None:
    """Session says what transformers and whole passes say, with an end token too."""
    session, expected = Session(model), generated(model, inputs)
    assert tokens(session, inputs) == expected == by_whole_passes(model, inputs)
    end = expected[0][3]
    assert tokens(session, inputs, eos_token_id=end) == generated(model, inputs, eos_token_id=end)


@pytest.mark.parametrize(("case", "rows"), pairs.SESSIONS)
def test_every_family(case, rows):
    both = pairs.pair(case)
    check(both.ours, both.inputs(rows))


@pytest.mark.parametrize("reference", ["meta", "hf"])
@pytest.mark.parametrize("rows", pairs.TILED_ROWS)
def test_llama_vision(rows, reference):
    model = pairs.make("mllama").ours
    model.reference = reference
    check(model, pairs.pair("mllama").inputs(rows))


@pytest.mark.parametrize("each", [0, 1, 2])
@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize(
    "model",
    [tiny.prepend(num_image_tokens=3), tiny.crossed()],
    ids=["tokens before the text", "added layers"],
)
def test_images_without_placeholders(model, rows, each):
    texts = {name: value[:rows] for name, value in tiny.texts().items()}
    images = {"pixel_values": tiny.images(rows * each)} if each else {}
    check(model, texts | images)


class Spy:
    """Counts the ids and images that a model's passes compute, and the logits they make."""

    def __init__(self, model, monkeypatch):
        self.model, self.ids, self.images, self.logits = model, [], 0, []
        compute, encode = model.compute, model.encode_images

        def counted(inputs):
            output = compute(inputs)
            self.ids.append(inputs.input_ids.shape[1])
            self.logits.append(output.logits)
            return output

        def encoded(inputs):
            self.images += len(inputs.pixel_values)
            return encode(inputs)

        monkeypatch.setattr(model, "compute", counted)
        monkeypatch.setattr(model, "encode_images", encoded)

    def since(self) -> list[int]:
        """Ids of each pass since the last call."""
        ids, self.ids = self.ids, []
        return ids


def turn(before: dict, answer: list[int], *more: int) -> dict:
    """The prompt of a chat's next turn."""
    ids = before["input_ids"][0].tolist() + answer + list(more)
    return before | {
        "input_ids": torch.tensor([ids]),
        "attention_mask": torch.ones(1, len(ids), dtype=torch.long),
    }


def first_turn(case: str, monkeypatch):
    """A spied model, its session, the first prompt, and its answer."""
    if case == "before the text":
        model = tiny.prepend(num_image_tokens=3)
        inputs = tiny.batch(tiny.tokens(7)) | {"pixel_values": tiny.images(1)}
    elif case == "added layers":
        model = tiny.crossed()
        for layer in (model.language_model.layers[1], model.language_model.layers[3]):
            layer.cross_attn_attn_gate.data.fill_(1)  # so that images matter
        inputs = tiny.batch(tiny.tokens(7)) | {"pixel_values": tiny.images(1)}
    else:
        model = pairs.make(case).ours
        inputs = pairs.pair(case).inputs("one row")
    spy, session = Spy(model, monkeypatch), Session(model)
    return spy, session, inputs, tokens(session, inputs)[0]


TURNS = ["llama", "gemma", "llava, clip, -2", "before the text", "added layers", "mllama"]


@pytest.mark.parametrize("case", TURNS)
def test_the_next_turn_computes_what_is_new_and_says_what_a_fresh_run_does(case, monkeypatch):
    spy, session, inputs, answer = first_turn(case, monkeypatch)
    assert spy.since() == [inputs["input_ids"].shape[1]] + [1] * (LENGTH - 1)
    images = spy.images
    second = turn(inputs, answer, *tiny.tokens(5, 9))
    answer = tokens(session, second)[0]
    assert spy.since() == [6] + [1] * (LENGTH - 1)  # the last token was never put in
    third = turn(second, answer, *tiny.tokens(3, 8))
    assert session.generate(third, max_new_tokens=1).num_reused_tokens == (
        second["input_ids"].shape[1] + LENGTH - 1
    )
    assert spy.images == images  # encoded once
    assert answer == tokens(Session(spy.model), second)[0] == generated(spy.model, second)[0]


@pytest.mark.parametrize("case", TURNS)
def test_a_prompt_that_differs_in_the_middle_is_cut_there(case, monkeypatch):
    spy, session, inputs, _ = first_turn(case, monkeypatch)
    other = {name: value.clone() for name, value in inputs.items()}
    other["input_ids"][0, -2] = 5
    spy.since()
    again = tokens(session, inputs)[0]
    assert spy.since()[0] == 1  # of the same prompt the last id
    assert tokens(session, other)[0] == tokens(Session(spy.model), other)[0]
    assert spy.since()[0] == 2
    assert again == tokens(session, inputs)[0] == tokens(Session(spy.model), inputs)[0]


@pytest.mark.parametrize("case", TURNS[2:])
def test_other_images_are_not_mistaken_for_these(case, monkeypatch):
    spy, session, inputs, _ = first_turn(case, monkeypatch)
    other = inputs | {"pixel_values": inputs["pixel_values"].flip(-1) * 3}
    expected = tokens(Session(spy.model), other)
    assert tokens(session, other) == expected != tokens(session, inputs)
    without = {"input_ids": torch.tensor([tiny.tokens(4)])}
    assert tokens(session, without) == tokens(Session(spy.model), without)
    assert tokens(session, inputs) == tokens(Session(spy.model), inputs)


def test_images_are_added_and_exchanged_one_by_one(monkeypatch):
    case = "llava, clip, -2"
    both, model = pairs.pair(case), pairs.make(case).ours
    spy, session = Spy(model, monkeypatch), Session(model)

    def prompt(*rows, pixels) -> dict:
        return both.inputs((rows,)) | {"pixel_values": pixels}

    pixels = both.images(3)
    two = prompt(2, "image", 3, "image", 2, pixels=pixels[:2])
    exchanged = two | {"pixel_values": pixels[[0, 2]]}
    three = turn(two, [], *two["input_ids"][0, 2:6].tolist(), 7) | {"pixel_values": pixels}
    whole, per = two["input_ids"].shape[1], model.spec.tokens_per_image
    for inputs, new in ((two, whole), (exchanged, 2 + per), (three, None), (two, None)):
        spy.since()
        assert tokens(session, inputs) == tokens(Session(model), inputs)
        assert new is None or spy.since()[0] == new


def test_a_prompt_seen_both_ways_is_computed_anew(monkeypatch):
    spy, session, inputs, answer = first_turn("paligemma", monkeypatch)
    second = turn(inputs, answer, 3, 4)
    second["token_type_ids"] = torch.zeros_like(second["input_ids"])
    spy.since()
    assert tokens(session, second) == generated(spy.model, second)
    assert spy.since()[0] == second["input_ids"].shape[1]
    del second["token_type_ids"]  # all of it is a prompt
    assert tokens(session, second) == generated(spy.model, second)


def test_a_batch_leaves_nothing_behind(monkeypatch):
    spy, session, inputs, _ = first_turn("llama", monkeypatch)
    tokens(session, pairs.pair("llama").inputs())
    spy.since()
    tokens(session, inputs)
    assert spy.since()[0] == inputs["input_ids"].shape[1]


@pytest.mark.parametrize("case", ["llama", "llava, clip, -2", "added layers"])
def test_a_long_prompt_is_computed_in_chunks(case, monkeypatch):
    spy, session, _, _ = first_turn(case, monkeypatch)
    for inputs in (
        {"input_ids": torch.tensor([tiny.tokens(50)])},
        tiny.batch(*map(tiny.tokens, (50, 9))),
    ):
        spy.since()
        assert tokens(Session(spy.model, prefill_chunk_size=16), inputs) == tokens(
            Session(spy.model), inputs
        )
        assert spy.since()[:4] == [16, 16, 16, 2]


def test_no_pass_makes_logits_of_more_than_the_last_position(monkeypatch):
    spy, session, inputs, _ = first_turn("llava, clip, -2", monkeypatch)
    tokens(
        Session(spy.model, prefill_chunk_size=16), {"input_ids": torch.tensor([tiny.tokens(50)])}
    )
    assert {None if one is None else tuple(one.shape[:2]) for one in spy.logits} == {None, (1, 1)}


def test_another_view_of_the_same_images_is_computed_anew(monkeypatch):
    spy, session, inputs, _ = first_turn("mllama", monkeypatch)
    blind = inputs["cross_attention_mask"].clone()
    blind[:, -3:] = 0
    other = inputs | {"cross_attention_mask": blind}
    spy.since()
    assert tokens(session, other) == tokens(Session(spy.model), other)
    assert spy.since()[0] == inputs["input_ids"].shape[1]


def test_a_mask_of_fewer_rows_than_ids_in_chunks_of_as_many():
    model, inputs = pairs.make("mllama").ours, pairs.pair("mllama").inputs("one row")
    inputs["cross_attention_mask"] = inputs["cross_attention_mask"][:, :4]
    expected = tokens(Session(model), inputs)
    assert tokens(Session(model, prefill_chunk_size=4), inputs) == expected
    shifted = inputs["cross_attention_mask"].roll(1, 1)
    for mask in (shifted * 0, shifted[0], shifted.repeat(2, 1, 1, 1), shifted[:, :0]):
        with pytest.raises(ValueError, match="cross_attention_mask"):
            Session(model).generate(inputs | {"cross_attention_mask": mask})


@pytest.mark.parametrize("kv_cache", ["int8", "bf16"])
@pytest.mark.parametrize("case", ["llama", "gemma3_text", "mllama"])
def test_a_cache_of_another_dtype_is_chunked_reused_and_cropped(case, kv_cache):
    model, chunk = pairs.pair(case).ours, 3
    ids = torch.randint(1, 90, (1, 14))
    expected = tokens(Session(model, kv_cache=kv_cache), {"input_ids": ids})
    chunked = Session(model, prefill_chunk_size=chunk, kv_cache=kv_cache)
    assert tokens(chunked, {"input_ids": ids}) == expected
    session = Session(model, kv_cache=kv_cache)
    other = torch.cat([ids[:, :9], ids[:, 9:13] % 89 + 1], 1)  # no later token is the same
    tokens(session, {"input_ids": other})
    found = session.generate({"input_ids": ids}, max_new_tokens=LENGTH)
    assert [row.token_ids for row in found.completions] == expected
    assert found.num_reused_tokens == 9


def test_a_wide_cache_changes_nothing_and_a_narrow_one_little():
    model, inputs = pairs.pair("gemma2").ours, pairs.pair("gemma2").inputs()
    assert tokens(Session(model, kv_cache="f32"), inputs) == tokens(Session(model), inputs)
    with pytest.raises(ValueError, match="kv_cache"):
        Session(model, kv_cache="int4")
