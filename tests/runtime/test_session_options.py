"""What a session's options do: ends, limits, text, sampling, interrupts, and what is refused."""

import pytest
import torch

import tiny
from mllama.runtime.session import Session
from tiny import pairs

PROMPT = {"input_ids": torch.tensor([tiny.tokens(9)])}
BATCH = tiny.batch(tiny.tokens(9), tiny.tokens(5, 3))


class Letters:
    """A tokenizer that writes id 33 and above as a character, others as special tokens."""

    eos_token_id = 0

    def decode(self, ids, skip_special_tokens: bool) -> str:
        return "".join(chr(i) for i in ids if i > 32)


@pytest.fixture
def session():
    return Session(pairs.pair("llama").ours, Letters())


def ids(generation) -> list[list[int]]:
    return [row.token_ids for row in generation.completions]


def reasons(generation) -> list[str]:
    return [row.finish_reason for row in generation.completions]


def test_rows_end_by_themselves(session):
    plain = session.generate(BATCH, max_new_tokens=8)
    assert reasons(plain) == ["length"] * 2 and plain.num_prompt_tokens == 9
    first, second = ids(plain)
    end = first[2]
    ended = session.generate(BATCH, max_new_tokens=8, eos_token_id=[end, 98765])
    cut = second[: second.index(end) + 1] if end in second else second
    assert ids(ended) == [first[: first.index(end) + 1], cut]
    assert reasons(ended) == ["eos", "eos" if end in second else "length"]


def test_the_end_token_is_the_calls_the_settings_or_the_tokenizers(session, monkeypatch):
    first = ids(session.generate(PROMPT, max_new_tokens=8))[0]
    for source in ("call", "settings", "tokenizer"):
        end = first[{"call": 1, "settings": 2, "tokenizer": 3}[source]]
        if source == "tokenizer":
            session = Session(session.model, Letters())
            monkeypatch.setattr(Letters, "eos_token_id", end)
        if source == "settings":
            session = Session(session.model, Letters(), {"eos_token_id": [end]})
        more = {"eos_token_id": end} if source == "call" else {}
        found = session.generate(PROMPT, max_new_tokens=8, **more)
        assert ids(found)[0] == first[: first.index(end) + 1] and reasons(found) == ["eos"]


def test_an_answer_ends_where_the_context_does(session):
    context = session.model.spec.text.max_position_embeddings
    long = {"input_ids": torch.tensor([tiny.tokens(context - 3)])}
    found = session.generate(long, max_new_tokens=50)
    assert len(ids(found)[0]) == 3 and reasons(found) == ["length"]
    full = {"input_ids": torch.tensor([tiny.tokens(context)])}
    with pytest.raises(ValueError, match=f"{context} tokens long"):
        session.generate(full)


def test_visual_tokens_before_the_text_take_context(monkeypatch):
    model = tiny.prepend(num_image_tokens=3)
    long = {"input_ids": torch.tensor([tiny.tokens(120)]), "pixel_values": tiny.images(1)}
    assert len(ids(Session(model).generate(long))[0]) == 128 - 120 - 3


def test_text_comes_piece_by_piece(session):
    pieces = []
    found = session.generate(PROMPT, max_new_tokens=8, on_text=lambda *piece: pieces.append(piece))
    text = Letters().decode(ids(found)[0], True)
    assert found.completions[0].text == text == "".join(piece for _, piece in pieces)
    assert len(pieces) == 8 and {row for row, _ in pieces} == {0}
    found = session.generate(BATCH, max_new_tokens=8, on_text=lambda *piece: pieces.append(piece))
    for index, row in enumerate(found.completions):
        assert row.text == "".join(piece for place, piece in pieces[8:] if place == index)
    assert Session(session.model).generate(PROMPT, max_new_tokens=2).completions[0].text is None


def test_a_stop_string_ends_the_text(session):
    text = session.generate(PROMPT, max_new_tokens=20).completions[0].text
    stop = text[4:6]
    found = session.generate(PROMPT, max_new_tokens=20, stop=["never", stop])
    assert found.completions[0].text == text[: text.index(stop)] and reasons(found) == ["stop"]
    assert Letters().decode(ids(found)[0], True).endswith(stop)
    assert session.generate(PROMPT, max_new_tokens=20, stop=stop).completions == found.completions


def test_sampling_follows_the_seed_and_the_settings(session):
    def draw(session=session, inputs=PROMPT, **options):
        return ids(session.generate(inputs, max_new_tokens=8, **options))

    hot = {"temperature": 5.0}
    assert draw(**hot, seed=1) == draw(**hot, seed=1) != draw(**hot, seed=2)
    assert draw(inputs=BATCH, **hot, seed=1) != draw(inputs=BATCH, **hot, seed=2)
    assert draw(top_k=1) == draw(temperature=0) == draw()
    frozen = Session(session.model, settings={"top_k": 1, "temperature": 9.0})
    assert draw(frozen, do_sample=True, seed=3) == draw()
    penal = Session(session.model, settings={"repetition_penalty": 1e6})
    assert len(set(draw(penal)[0])) == 8 and not set(draw(penal)[0]) & set(tiny.tokens(9))


def test_a_seed_for_each_row_draws_what_the_row_draws_alone(session):
    hot = {"max_new_tokens": 8, "temperature": 5.0}
    rows = ids(session.generate(BATCH, **hot, seed=[7, 8]))
    for seed, (row, mask), expected in zip(
        (7, 8), zip(BATCH["input_ids"], BATCH["attention_mask"], strict=True), rows, strict=True
    ):
        alone = session.generate({"input_ids": row[mask != 0][None]}, **hot, seed=seed)
        assert ids(alone) == [expected]
    assert ids(session.generate(BATCH, **hot, seed=(7, 9)))[0] == rows[0]


@pytest.mark.parametrize("at", [1, 5])
def test_an_interrupt_keeps_what_there_is(session, monkeypatch, at):
    expected = ids(session.generate(PROMPT, max_new_tokens=8))
    layer, calls = session.model.language_model.layers[1], []

    def interrupt(*_):
        calls.append(1)
        if len(calls) == at:
            raise KeyboardInterrupt

    session.reset()
    hook = layer.register_forward_pre_hook(interrupt)  # the layer before has written already
    found = session.generate(PROMPT, max_new_tokens=8, interruptible=True)
    assert ids(found) == [expected[0][: at - 1]] and reasons(found) == ["interrupted"]
    assert ids(session.generate(PROMPT, max_new_tokens=8)) == expected
    calls.clear()
    session.reset()
    with pytest.raises(KeyboardInterrupt):
        session.generate(PROMPT, max_new_tokens=8)
    hook.remove()
    assert ids(session.generate(PROMPT, max_new_tokens=8)) == expected


def test_a_session_that_generates_is_not_used_for_another_text(session):
    expected = ids(session.generate(PROMPT, max_new_tokens=8))
    with pytest.raises(RuntimeError, match="generate"):
        session.generate(PROMPT, on_text=lambda *_: session.generate(PROMPT))
    with pytest.raises(RuntimeError, match="reset"):
        session.generate(PROMPT, on_text=lambda *_: session.reset())
    assert ids(session.generate(PROMPT, max_new_tokens=8)) == expected


def test_an_error_leaves_a_session_that_works(session, monkeypatch):
    expected = ids(session.generate(PROMPT, max_new_tokens=8))
    with pytest.raises(IndexError):
        session.generate({"input_ids": torch.tensor([[*tiny.tokens(9), 5000]])})
    assert ids(session.generate(PROMPT, max_new_tokens=8)) == expected


def test_timings_and_counts(session):
    found = session.generate(PROMPT, max_new_tokens=8)
    timings = found.timings
    assert (found.num_prompt_tokens, found.num_reused_tokens) == (9, 0)
    assert (timings.image.count, timings.prompt.count, timings.decode.count) == (0, 9, 7)
    assert timings.prompt.seconds > 0 < timings.decode.seconds and timings.image.rate is None
    assert timings.prompt.seconds <= timings.first_token_seconds < timings.total_seconds
    assert timings.decode.rate == 7 / timings.decode.seconds
    again = session.generate(PROMPT, max_new_tokens=8)
    assert (again.num_reused_tokens, again.timings.prompt.count) == (8, 1)


def test_one_padded_row_is_as_without_padding(session):
    padded = {
        "input_ids": torch.tensor([[0, 0, *tiny.tokens(9)]]),
        "attention_mask": torch.tensor([[0, 0] + [1] * 9]),
    }
    first = ids(session.generate(padded, max_new_tokens=6))
    assert first == ids(Session(session.model).generate(PROMPT, max_new_tokens=6))
    # Its answer is no prompt that the cache would have.
    again = {"input_ids": torch.tensor([[*first[0][:4], 5]])}
    found = session.generate(again, max_new_tokens=6)
    assert found.num_reused_tokens == 0
    assert ids(found) == ids(Session(session.model).generate(again, max_new_tokens=6))


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"max_new_tokens": 0}, ValueError, "max_new_tokens"),
        ({"max_new_tokens": 2.0}, TypeError, "max_new_tokens"),
        ({"max_new_tokens": True}, TypeError, "max_new_tokens"),
        ({"eos_token_id": "x"}, TypeError, "eos_token_id"),
        ({"stop": [""]}, ValueError, "stop"),
        ({"stop": [5]}, ValueError, "stop"),
        ({"stop": None}, TypeError, "stop"),
        ({"on_text": "print"}, TypeError, "on_text"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"temperature": 0, "top_k": -3}, ValueError, "top_k"),
        ({"top_p": 2}, ValueError, "top_p"),
        ({"num_beams": 2}, TypeError, "num_beams"),
        ({"do_sample": False, "top_k": 4}, ValueError, "top_k"),
    ],
)
def test_options_are_refused_by_name(session, options, error, name):
    with pytest.raises(error, match=name):
        session.generate(PROMPT, **options)


@pytest.mark.parametrize(
    ("changed", "error", "name"),
    [
        ({"input_ids": None}, TypeError, "input_ids"),
        ({"input_ids": [[1, 2]]}, TypeError, "input_ids"),
        ({"input_ids": torch.ones(1, 2)}, TypeError, "input_ids"),
        ({"input_ids": torch.ones(1, 2, dtype=torch.uint8)}, TypeError, "input_ids"),
        ({"input_ids": torch.tensor(1)}, ValueError, "input_ids"),
        ({"input_ids": torch.ones(1, 0, dtype=torch.long)}, ValueError, "input_ids"),
        ({"input_ids": torch.ones(0, 2, dtype=torch.long)}, ValueError, "input_ids"),
        ({"attention_mask": [[1] * 9]}, TypeError, "attention_mask"),
        ({"attention_mask": torch.ones(1, 3)}, ValueError, "attention_mask"),
        ({"attention_mask": torch.tensor([[1] * 8 + [0]])}, ValueError, "attention_mask"),
        ({"attention_mask": torch.tensor([[1, 0] + [1] * 7])}, ValueError, "attention_mask"),
        ({"labels": PROMPT["input_ids"]}, TypeError, "labels"),
        ({"aspect_ratio_ids": torch.ones(1, 1)}, ValueError, "aspect_ratio_ids"),
        ({"pixel_values": tiny.images(1)}, ValueError, "pixel_values"),
        ({"cross_attention_mask": torch.ones(1, 9, 1, 1)}, ValueError, "cross_attention_mask"),
    ],
)
def test_inputs_are_refused_by_name(session, changed, error, name):
    with pytest.raises(error, match=name):
        session.generate(PROMPT | changed)


@pytest.mark.parametrize(
    ("arguments", "error", "name"),
    [
        ({"processor": 5}, TypeError, "processor"),
        ({"settings": 5}, TypeError, "settings"),
        ({"settings": {"num_beams": 4}}, ValueError, "num_beams"),
        ({"prefill_chunk_size": 0}, ValueError, "prefill_chunk_size"),
        ({"progress": 5}, TypeError, "progress"),
    ],
)
def test_arguments_are_refused_by_name(session, arguments, error, name):
    with pytest.raises(error, match=name):
        Session(session.model, **arguments)


def test_text_needs_a_processor(session):
    bare = Session(session.model)
    for options in ({"stop": ["a"]}, {"on_text": print}):
        with pytest.raises(ValueError, match="processor"):
            bare.generate(PROMPT, **options)
    for size in (0, 1.5):
        with pytest.raises((ValueError, TypeError), match="prefill_chunk_size"):
            Session(session.model, prefill_chunk_size=size)
