"""Progress of loading and generation, as callbacks get it."""

import pytest
import torch

import mllama
import tiny
from mllama.api import open_session
from mllama.hf.answering import GenerateSession
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.questions import encode
from mllama.runtime.session import Session
from tiny import pairs

PROMPT = {"input_ids": torch.tensor([tiny.tokens(9)])}


class Told(list):
    """A `Progress` that remembers its calls."""

    def __call__(self, *step) -> None:
        self.append(step)

    def since(self) -> list:
        """The calls since the last time."""
        found = list(self)
        self.clear()
        return found


def test_a_prompt_in_chunks_and_what_is_reused():
    session = Session(pairs.pair("llama").ours, prefill_chunk_size=4, progress=(told := Told()))
    session.generate(PROMPT, max_new_tokens=3)
    decode = [("decode", done, 3) for done in (1, 2, 3)]
    assert told.since() == [("prompt", done, 9) for done in (0, 4, 8, 9)] + decode
    session.generate(PROMPT, max_new_tokens=3)
    assert told.since() == [("prompt", 8, 9), ("prompt", 9, 9), *decode]


@pytest.mark.parametrize(("case", "images"), [("llava, clip, -2", 1), ("mllama", 2)])
def test_images(case, images):
    both, told = pairs.pair(case), Told()
    inputs = both.inputs(([2, *["image", 3] * images],))
    session = Session(both.ours, progress=told)
    found = session.generate(inputs, max_new_tokens=2)
    tokens = inputs["input_ids"].numel()
    expected = [("prompt", 0, tokens), ("prompt", tokens, tokens), ("decode", 1, 2)]
    steps = [("image", done, images) for done in range(images + 1)]
    assert told.since() == [*steps, *expected, DONE]
    assert found.timings.image.count == images and found.timings.image.seconds > 0
    assert session.generate(inputs, max_new_tokens=2).timings.image.count == 0


DONE = ("decode", 2, 2)


def test_an_image_from_a_file_is_done_and_not_counted(tmp_path):
    both, told = pairs.pair("mllama"), Told()
    inputs = both.inputs(([2, "image", 3],))
    for count in (1, 0):
        session = Session(both.ours, image_cache=ImageCache(folder=tmp_path), progress=told)
        found = session.generate(inputs, max_new_tokens=2)
        assert told.since()[:2] == [("image", 0, 1), ("image", 1, 1)]
        assert found.timings.image.count == count


def test_rows_that_end_early():
    model, inputs = pairs.pair("llama").ours, tiny.batch(tiny.tokens(9), tiny.tokens(5))
    plain = Session(model).generate(inputs, max_new_tokens=8)
    end = next(
        token
        for token in plain.completions[0].token_ids[1:-1]
        if token not in plain.completions[1].token_ids
    )
    session = Session(model, progress=(told := Told()))
    found = session.generate(inputs, max_new_tokens=8, eos_token_id=end)
    lengths = [len(row.token_ids) for row in found.completions]
    assert lengths[0] < lengths[1] == 8 and found.timings.decode.count == sum(lengths) - 2
    assert (told[0], told[-1]) == (("prompt", 0, 18), ("decode", sum(lengths), 16))


def test_an_error_of_the_callback_leaves_a_session_that_works():
    session = Session(pairs.pair("llama").ours)
    expected = session.generate(PROMPT, max_new_tokens=4).completions
    for failing in ("prompt", "decode"):

        def fail(stage, done, total, failing=failing):
            if stage == failing and done:
                raise OSError("no terminal")

        session.progress = fail
        with pytest.raises(OSError):
            session.generate(PROMPT, max_new_tokens=4)
        session.progress = None
        assert session.generate(PROMPT, max_new_tokens=4).completions == expected


def test_transformers_generate():
    model, told = pairs.pair("llama").ours, Told()
    session = GenerateSession(model, None, told)
    session.tokenizer = tiny.tokenizers.make()
    inputs = tiny.batch(tiny.tokens(9), tiny.tokens(5))
    found = session.generate(inputs, max_new_tokens=4)
    assert told.since() == [
        ("prompt", 0, 18),
        ("prompt", 18, 18),
        ("decode", 2, 0),
        ("decode", 4, 0),
        ("decode", 6, 0),
        ("decode", 8, 0),
    ]
    assert (found.timings.prompt.count, found.timings.decode.count) == (18, 6)
    beams = session.generate(PROMPT, max_new_tokens=4, num_beams=2).timings
    assert (beams.prompt.count, beams.decode.count) == (9, 3) and told[-1] == ("decode", 4, 0)
    assert 0 < beams.first_token_seconds < beams.total_seconds


@pytest.mark.parametrize("weights", ["none", "int8"])
def test_loading(model_folder, image_file, weights):
    session = open_session(
        model_folder, "float32", "cpu", weights=weights, progress=(told := Told())
    )
    stages, done, totals = zip(*told.since(), strict=True)
    count = sum(p.numel() for p in mllama.load(model_folder, "float32", "cpu")[0].parameters())
    assert set(stages) == {"load"} and set(totals) == {count}
    assert (done[0], done[-1]) == (0, count) and list(done) == sorted(set(done))
    session.generate(encode(session.processor, image_file, "How many?"), max_new_tokens=1)
    assert {stage for stage, _, _ in told} == {"image", "prompt", "decode"}


def test_loading_refuses_by_name(model_folder):
    with pytest.raises(TypeError, match="progress"):
        open_session(model_folder, progress=5)
