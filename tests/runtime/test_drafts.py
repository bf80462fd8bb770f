"""Speculative decoding says what plain decoding says, whatever is guessed."""

import copy
from unittest import mock

import pytest
import torch

import tiny
from helpers import needs_kernels
from mllama.quant.packer import optimize
from mllama.runtime.drafts import MAX_DRAFTS, AcceptanceRate, PromptLookup
from mllama.runtime.session import Session
from tiny import pairs

PROMPT = {"input_ids": torch.tensor([tiny.tokens(5) * 3])}
LENGTH = 24


class Letters:
    """A tokenizer that writes id 33 and above as a character, others as special tokens."""

    eos_token_id = 0

    def decode(self, ids, skip_special_tokens: bool) -> str:
        return "".join(chr(i) for i in ids if i > 32)


class Oracle:
    """Knows what is to come, and is wrong at every `wrong`-th token.

    Args:
        expected: the tokens to come.
        count: drafts in one pass.
    """

    def __init__(self, expected: list[int], count: int = 5, wrong: int = 4):
        self._expected, self._count, self._wrong, self.passes = expected, count, wrong, 0

    def begin(self, ids: list[int]) -> None:
        self.prompt, self.taken = ids, []

    def add(self, token: int) -> None:
        self.taken.append(token)

    def propose(self, most: int) -> list[int]:
        self.passes += 1
        start = len(self.taken)
        assert most >= 0 and self.taken == self._expected[:start]
        right = self._expected[start : start + min(most, self._count)]
        return [
            token + 1 - 2 * (token > 50) if place % self._wrong == 0 else token
            for place, token in enumerate(right, start)
        ]


def ids(generation) -> list[int]:
    return generation.completions[0].token_ids


def with_oracle(session: Session, expected: list[int], **options) -> Session:
    session._drafter = Oracle(expected, **options)
    return session


def check(model, inputs, tokenizer=None, kv_cache=None, **options):
    """Completions, streamed text and the cache left, plain and with drafts."""
    results, caches = [], []
    for drafted in (False, True):
        session = Session(model, tokenizer, kv_cache=kv_cache)
        if drafted:
            longest = dict(options, max_new_tokens=LENGTH + 9, stop=(), eos_token_id=[])
            if tokenizer is None:
                longest.pop("stop")
            plain = Session(model, tokenizer, kv_cache=kv_cache)
            with_oracle(session, ids(plain.generate(inputs, **longest)))
        pieces = []
        more = {} if tokenizer is None else {"on_text": lambda _, text, to=pieces: to.append(text)}
        made = session.generate(inputs, **({"max_new_tokens": LENGTH} | options | more))
        results.append((made.completions, pieces, made.timings.decode.count))
        caches.append((session._prompt.cache.length, session._prompt.ids))
    assert results[0] == results[1] and caches[0] == caches[1]
    assert made.num_accepted_tokens <= made.num_drafted_tokens
    return made


@pytest.mark.parametrize(("case", "rows"), pairs.SESSIONS)
def test_every_family(case, rows):
    both = pairs.pair(case)
    expected = Session(both.ours).generate(both.inputs(rows), max_new_tokens=LENGTH)
    session = Session(both.ours, prompt_lookup_tokens=7)
    made = session.generate(both.inputs(rows), max_new_tokens=LENGTH)
    assert made.completions == expected.completions
    assert len(made.completions) == 1 or made.num_drafted_tokens == 0


ONE_ROW = ["llama", "gemma", "gemma2", "gemma3_text", "llava, clip, -2", "paligemma, gemma2"]


@needs_kernels
@pytest.mark.parametrize("kv_cache", [None, "int8"])
@pytest.mark.parametrize("case", [*ONE_ROW, "mllama"])
def test_right_and_wrong_drafts(case, kv_cache):
    """Windows are shorter than the text here, and images' keys stay when drafts are dropped."""
    both = pairs.pair(case)
    model, inputs = optimize(copy.deepcopy(both.ours), "int4"), both.inputs("one row")
    made = check(model, inputs, kv_cache=kv_cache, eos_token_id=[])
    assert made.num_accepted_tokens > LENGTH // 2


@pytest.mark.parametrize("count", range(1, 5))
def test_as_many_positions_as_the_prompt_has(count):
    """A pass reads its own rows of a cross_attention_mask, not those of the prompt."""
    model = pairs.make("mllama").ours
    model.reference = "meta"
    for name, parameter in model.named_parameters():
        if name.endswith("_gate"):
            torch.nn.init.constant_(parameter, 1.0)
    inputs = pairs.pair("mllama").inputs(([1, "image", 1],))  # the first token sees no image
    options = {"max_new_tokens": 9, "eos_token_id": []}
    expected = Session(model).generate(inputs, **options).completions
    session = with_oracle(Session(model), expected[0].token_ids, count=count, wrong=99)
    assert session.generate(inputs, **options).completions == expected


@pytest.mark.parametrize("each", [0, 1])
@pytest.mark.parametrize(
    "model",
    [tiny.prepend(num_image_tokens=3), tiny.crossed()],
    ids=["tokens before the text", "added layers"],
)
def test_images_without_placeholders(model, each):
    images = {"pixel_values": tiny.images(each)} if each else {}
    check(model, {"input_ids": torch.tensor([tiny.tokens(7)])} | images, eos_token_id=[])


@pytest.fixture(scope="module")
def model():
    return pairs.pair("llama").ours


@pytest.mark.parametrize("length", [1, 2, 3, 7, 8])
def test_the_last_token_within_drafts(model, length):
    check(model, PROMPT, max_new_tokens=length, eos_token_id=[])


@pytest.mark.parametrize("place", range(6))
def test_an_end_token_within_drafts(model, place):
    tokens = ids(Session(model).generate(PROMPT, max_new_tokens=LENGTH))
    made = check(model, PROMPT, eos_token_id=tokens[place])
    assert made.completions[0].finish_reason == "eos"


@pytest.mark.parametrize("place", range(2, 8))
def test_a_stop_string_within_drafts(model, place):
    text = Session(model, Letters()).generate(PROMPT, max_new_tokens=LENGTH).completions[0].text
    made = check(model, PROMPT, Letters(), stop=[text[place : place + 2]])
    assert made.completions[0].finish_reason == "stop"


def test_the_end_of_the_context_within_drafts(model):
    context = model.spec.text.max_position_embeddings
    inputs = {"input_ids": torch.tensor([tiny.tokens(context - 7)])}
    made = check(model, inputs, max_new_tokens=50, eos_token_id=[])
    assert len(ids(made)) == 7


@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 1.3},
        {"temperature": 2.0, "seed": 3},
        {"temperature": 0.5, "top_k": 20, "top_p": 0.9, "min_p": 0.01, "seed": [4]},
        {"temperature": 5.0, "repetition_penalty": 1.5, "seed": 5},
    ],
    ids=str,
)
def test_processed_and_drawn_tokens(model, options):
    made = check(model, PROMPT, **options, eos_token_id=[])
    assert made.num_accepted_tokens > LENGTH // 2
    lookup = Session(model, prompt_lookup_tokens=4)
    again = lookup.generate(PROMPT, max_new_tokens=LENGTH, **options, eos_token_id=[])
    assert again.completions == made.completions


def test_one_padded_row(model):
    padded = {
        "input_ids": torch.tensor([[0, 0, *tiny.tokens(9)]]),
        "attention_mask": torch.tensor([[0, 0] + [1] * 9]),
    }
    expected = ids(Session(model).generate(padded, max_new_tokens=LENGTH))
    session = with_oracle(Session(model), expected)
    assert ids(session.generate(padded, max_new_tokens=LENGTH)) == expected
    assert session._drafter.prompt == tiny.tokens(9)


def test_several_rows_are_generated_plainly(model):
    batch = tiny.batch(tiny.tokens(9), tiny.tokens(5, 3))
    expected = Session(model).generate(batch, max_new_tokens=6).completions
    for drafting in ({"prompt_lookup_tokens": 5}, {"draft_model": copy.deepcopy(model)}):
        made = Session(model, **drafting).generate(batch, max_new_tokens=6)
        assert made.completions == expected and made.num_drafted_tokens == 0


def test_the_next_turn_reuses_what_plain_decoding_leaves(model):
    plain, drafted = Session(model), Session(model)
    answer = ids(plain.generate(PROMPT, max_new_tokens=LENGTH))
    with_oracle(drafted, answer).generate(PROMPT, max_new_tokens=LENGTH)
    turn = {"input_ids": torch.tensor([[*PROMPT["input_ids"][0].tolist(), *answer, 5, 6]])}
    drafted._drafter = None
    first, second = (one.generate(turn, max_new_tokens=4) for one in (plain, drafted))
    assert first.num_reused_tokens == second.num_reused_tokens > len(answer)
    assert first.completions == second.completions


@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupt_within_drafts(model, at):
    session, expected = Session(model, Letters()), Session(model, Letters())
    answer = ids(expected.generate(PROMPT, max_new_tokens=LENGTH))
    with_oracle(session, answer)
    pieces = []

    def interrupt(row: int, text: str) -> None:
        pieces.append(text)
        if len(pieces) == at:
            raise KeyboardInterrupt

    found = session.generate(PROMPT, max_new_tokens=8, on_text=interrupt, interruptible=True)
    assert ids(found) == answer[:at] and found.completions[0].finish_reason == "interrupted"
    turn = {"input_ids": torch.tensor([[*PROMPT["input_ids"][0].tolist(), *answer[:at], 5]])}
    session._drafter = None
    fresh = Session(model, Letters()).generate(turn, max_new_tokens=6)
    assert ids(session.generate(turn, max_new_tokens=6)) == ids(fresh)


@pytest.mark.parametrize("error", [KeyboardInterrupt, ZeroDivisionError])
@pytest.mark.parametrize("at", range(1, 9))
def test_an_interrupted_answer_leaves_no_drafts(model, at, error):
    answer = ids(Session(model).generate(PROMPT, max_new_tokens=LENGTH))
    sessions = Session(model, Letters()), with_oracle(Session(model, Letters()), answer)
    for session in sessions:
        left = iter(range(1, at))

        def fail(row: int, text: str, left=left) -> None:
            if next(left, None) is None:
                raise error

        with pytest.raises(error):
            session.generate(PROMPT, max_new_tokens=LENGTH, on_text=fail)
    plain, drafted = (session._prompt for session in sessions)
    assert drafted.ids == plain.ids == [*PROMPT["input_ids"][0].tolist(), *answer[: at - 1]]
    assert drafted.cache.length == plain.cache.length


def test_an_interrupt_within_a_pass_of_drafts(model):
    """The pass is undone: none of its drafts are dropped from what was there before."""
    answer = ids(Session(model).generate(PROMPT, max_new_tokens=LENGTH))
    session = with_oracle(Session(model), answer, wrong=99)
    whole, calls = model.compute, []

    def compute(inputs):
        calls.append(inputs)
        output = whole(inputs)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return output

    with mock.patch.object(model, "compute", compute):
        session.generate(PROMPT, max_new_tokens=LENGTH, interruptible=True)
    assert session._prompt.ids == [*PROMPT["input_ids"][0].tolist(), *answer[:6]]
    assert session._prompt.cache.length == len(session._prompt.ids)


@needs_kernels
def test_fewer_passes_on_a_text_that_repeats_itself():
    model = optimize(copy.deepcopy(pairs.pair("llama").ours), "f32")
    options = {"max_new_tokens": 80, "repetition_penalty": 0.01}  # a reward
    plain = Session(model).generate(PROMPT, **options)
    made = Session(model, prompt_lookup_tokens=MAX_DRAFTS).generate(PROMPT, **options)
    assert made.completions == plain.completions
    assert made.timings.decode.count == plain.timings.decode.count == 79
    assert 40 < made.num_accepted_tokens <= made.num_drafted_tokens


# ---- prompt lookup


def lookup(ids: list[int], rate: float = 1.0, most: int = MAX_DRAFTS) -> PromptLookup:
    made = PromptLookup(most)
    made.begin(ids)
    for one in made._rates.values():
        one.value = rate
    return made


@pytest.mark.parametrize(
    ("text", "most", "expected"),
    [
        ([1, 2, 3, 4, 5, 6, 9, 1, 2], 3, [3, 4, 5]),
        ([1, 2, 3, 9, 1, 2, 4, 9, 1, 2], 3, [4, 9, 1]),  # the latest place
        ([7, 1, 2, 3, 8, 1, 2, 4, 7, 1, 2], 2, [3, 8]),  # the longest match
        ([1, 2, 1, 2], 5, [1, 2, 1, 2, 1]),  # on into what is guessed
        ([5, 5, 5], 4, [5, 5, 5, 5]),
        ([1, 2, 3, 4], 3, []),
        ([1, 2, 1], 3, []),  # one token is no match
        ([1, 2, 3, 1, 2], 0, []),
        ([], 3, []),
    ],
)
def test_what_is_looked_up(text, most, expected):
    assert lookup(text).propose(most) == expected


def test_most_drafts_of_a_lookup():
    assert lookup([1, 2, 3, 4, 5, 1, 2], most=2).propose(9) == [3, 4]


def test_a_lookup_that_fails_drafts_no_more_and_one_that_succeeds_again_does():
    made = lookup([1, 2, 3] * 3, rate=0.5)
    count = 0
    for token in range(4, 44):  # 1 2 is there, and never goes on as before
        made.add(1), made.add(2)
        count += len(made.propose(8))
        made.add(token)
    assert 0 < count < 20
    for _ in range(20):
        for token in (7, 8, 9):
            drafts = made.propose(8)
            made.add(token)
    assert len(drafts) == 8


@pytest.mark.parametrize(
    ("rate", "most", "cost", "count"),
    [(0, 9, 0.1, 0), (1, 9, 0.1, 9), (1, 99, 0.1, 15), (0.5, 9, 0.2, 1), (0.9, 9, 2.0, 0)],
)
def test_how_many_drafts_pay(rate, most, cost, count):
    acceptance = AcceptanceRate()
    acceptance.value = rate
    assert acceptance.best_count(most, cost) == count


# ---- draft models


def smaller(seed: int = 1, **options):
    return pairs.make("llama", seed, **options).ours


@needs_kernels
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("case", ["llama", "llava, clip, -2", "mllama"])
def test_draft_models(case, packed):
    both = pairs.pair(case)
    model, inputs = copy.deepcopy(both.ours), both.inputs("one row")
    draft = smaller(num_hidden_layers=1, vocab_size=model.spec.text.vocab_size)
    if packed:
        model, draft = optimize(model, "int4"), optimize(draft, "int4")
    plain, drafted = Session(model), Session(model, draft_model=draft)
    for options in ({}, {"temperature": 2.0, "seed": 1}, {"max_new_tokens": 3}):
        options = {"max_new_tokens": LENGTH, "eos_token_id": []} | options
        expected, made = plain.generate(inputs, **options), drafted.generate(inputs, **options)
        assert made.completions == expected.completions and made.num_drafted_tokens > 0


@needs_kernels
def test_a_draft_model_that_is_right(model):
    model = optimize(copy.deepcopy(model), "f32")
    session = Session(model, draft_model=copy.deepcopy(model))
    session._drafter._cost = 0.1  # as if it were small
    expected = Session(model).generate(PROMPT, max_new_tokens=60, eos_token_id=[])
    for _ in range(2):  # the second time its cache has the prompt
        made = session.generate(PROMPT, max_new_tokens=60, eos_token_id=[])
        assert made.completions == expected.completions
        assert made.num_drafted_tokens - made.num_accepted_tokens < 5
        assert made.num_accepted_tokens > 40
    session.reset()
    assert session.generate(PROMPT, max_new_tokens=9).num_drafted_tokens > 0


def test_a_draft_model_that_does_not_pay_is_asked_now_and_then(model):
    session = Session(model, draft_model=smaller(seed=9))
    session._drafter._rate.value = 0.0
    made = session.generate(PROMPT, max_new_tokens=60, eos_token_id=[])
    assert (
        made.completions
        == Session(model).generate(PROMPT, max_new_tokens=60, eos_token_id=[]).completions
    )
    assert 2 <= made.num_drafted_tokens <= 6


def test_a_draft_model_of_a_shorter_context(model):
    draft = smaller(max_position_embeddings=20)
    made = Session(model, draft_model=draft).generate(PROMPT, max_new_tokens=40, eos_token_id=[])
    expected = Session(model).generate(PROMPT, max_new_tokens=40, eos_token_id=[])
    assert made.completions == expected.completions and made.num_drafted_tokens <= 5


@pytest.mark.parametrize(
    ("options", "error", "name"),
    [
        ({"prompt_lookup_tokens": -1}, ValueError, "prompt_lookup_tokens"),
        ({"prompt_lookup_tokens": 16}, ValueError, "prompt_lookup_tokens"),
        ({"prompt_lookup_tokens": 2.0}, TypeError, "prompt_lookup_tokens"),
        ({"prompt_lookup_tokens": True}, TypeError, "prompt_lookup_tokens"),
        ({"draft_model": "model"}, TypeError, "draft_model"),
        ({"draft_model": pairs.pair("llama").ours}, ValueError, "draft_model"),
        ({"draft_model": pairs.pair("llava, clip, -2").ours}, ValueError, "draft_model"),
        ({"draft_model": pairs.make("llama", vocab_size=50).ours}, ValueError, "draft_model"),
        (
            {"draft_model": pairs.make("llama", 1).ours, "prompt_lookup_tokens": 2},
            ValueError,
            "draft_model",
        ),
    ],
    ids=str,
)
def test_options_are_refused_by_name(model, options, error, name):
    with pytest.raises(error, match=name):
        Session(model, **options)
