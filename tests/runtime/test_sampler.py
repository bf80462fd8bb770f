"""The sampler against transformers' logits processors."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mllama.runtime.sampler import Sampler, Sampling

VOCABULARY = 50
WAYS = [
    {},
    {"temperature": 0.3},
    {"top_k": 7},
    {"top_k": 500},
    {"top_p": 0.6},
    {"top_p": 0.0},
    {"min_p": 0.2},
    {"repetition_penalty": 1.7},
    {"temperature": 2.5, "top_k": 20, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 0.8},
]


def logits(rows: int = 4, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCABULARY, generator=torch.Generator().manual_seed(seed))


def prompt(rows: int = 4) -> torch.Tensor:
    return torch.randint(VOCABULARY, (rows, 9), generator=torch.Generator().manual_seed(1))


def theirs(options: dict) -> LogitsProcessorList:
    """In the order of transformers' `generate`."""
    kinds = {
        "repetition_penalty": RepetitionPenaltyLogitsProcessor,
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
    }
    return LogitsProcessorList(
        kind(options[name]) for name, kind in kinds.items() if name in options
    )


@pytest.mark.parametrize("options", WAYS)
def test_scores_are_those_of_transformers(options):
    sampler, processors, ids = (
        Sampler(Sampling(True, **options), prompt()),
        theirs(options),
        prompt(),
    )
    for step in range(3):  # with what was sampled before
        scores = logits(seed=step)
        expected = processors(ids, scores.clone())
        torch.testing.assert_close(sampler.process(scores).softmax(-1), expected.softmax(-1))
        ids = torch.cat([ids, sampler(scores)[:, None]], 1)


@pytest.mark.parametrize("options", WAYS)
def test_tokens_are_as_frequent_as_their_probabilities(options):
    draws, scores = 20000, logits(1)
    sampler = Sampler(Sampling(True, **options, seed=3), prompt(1).expand(draws, -1))
    drawn = sampler(scores.expand(draws, -1)).bincount(minlength=VOCABULARY) / draws
    expected = theirs(options)(prompt(1), scores.clone()).softmax(-1)[0]
    assert (drawn[expected == 0] == 0).all()
    assert (drawn - expected).abs().max() < 4 * (0.25 / draws) ** 0.5


def test_greedy_is_the_likeliest_token_and_takes_a_repetition_penalty():
    assert Sampler(Sampling(), prompt())(logits()).tolist() == logits().argmax(-1).tolist()
    cold = Sampling(True, temperature=1e-40)
    assert Sampler(cold, prompt())(logits()).tolist() == logits().argmax(-1).tolist()
    likeliest = logits().argmax(-1, keepdim=True)
    sampler = Sampler(Sampling(repetition_penalty=100.0), likeliest)
    assert sampler(logits()).tolist() == logits().scatter(1, likeliest, -1e9).argmax(-1).tolist()
    second = sampler(logits())  # the answer's own tokens count too
    assert (second != likeliest[:, 0]).all()


def test_padding_and_ids_without_a_logit_have_no_penalty():
    options, scores = Sampling(repetition_penalty=2.0), logits(1)
    ids = torch.tensor([[3, VOCABULARY + 7, 5]])
    padded = Sampler(options, ids, torch.tensor([[False, True, True]])).process(scores)
    assert torch.equal(padded, Sampler(options, ids[:, 2:]).process(scores))


def test_half_precision_is_chosen_from_in_float32():
    scores = logits().bfloat16()
    processed = Sampler(Sampling(True, top_p=0.7), prompt()).process(scores)
    assert processed.dtype == torch.float32
    assert torch.equal(
        processed, Sampler(Sampling(True, top_p=0.7), prompt()).process(scores.float())
    )


def test_a_seed_repeats_the_draws_and_none_is_torchs_own():
    def draw(seed):
        sampler = Sampler(Sampling(True, seed=seed), prompt(100))
        return [sampler(logits(1).expand(100, -1)).tolist() for _ in range(3)]

    assert draw(1) == draw(1) != draw(2)
    torch.manual_seed(5)
    first = draw(None)
    torch.manual_seed(5)
    assert draw(None) == first


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"do_sample": 1}, TypeError),
        ({"temperature": "hot"}, TypeError),
        ({"temperature": True}, TypeError),
        ({"temperature": -0.1}, ValueError),
        ({"temperature": float("nan")}, ValueError),
        ({"temperature": float("inf")}, ValueError),
        ({"top_k": 2.5}, TypeError),
        ({"top_k": -1}, ValueError),
        ({"top_p": 1.1}, ValueError),
        ({"min_p": -0.1}, ValueError),
        ({"repetition_penalty": 0}, ValueError),
        ({"seed": -1}, ValueError),
        ({"seed": 2**64}, ValueError),
    ],
)
def test_what_is_refused(options, error):
    with pytest.raises(error, match=next(iter(options))):
        Sampling(**{"do_sample": True} | options)


@pytest.mark.parametrize("option", ["temperature", "top_k", "top_p", "min_p", "seed"])
def test_options_without_effect_are_refused(option):
    with pytest.raises(ValueError, match=option):
        Sampling(False, **{option: 0.5 if option in ("temperature", "top_p", "min_p") else 3})


def test_a_callers_options_are_completed_by_the_models():
    defaults = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.1}
    choose = Sampling.choose
    assert choose({}, {}) == Sampling()
    assert choose({}, defaults) == Sampling(repetition_penalty=1.1)
    assert choose({"top_p": None}, defaults) == Sampling(repetition_penalty=1.1)
    assert choose({"temperature": 2.0}, {}) == Sampling(True, temperature=2.0, top_k=50)
    assert choose({"do_sample": True, "seed": 4}, defaults) == Sampling(
        True, temperature=0.6, top_k=50, top_p=0.9, repetition_penalty=1.1, seed=4
    )
    assert choose({"temperature": 0, "top_k": 5}, defaults) == Sampling(repetition_penalty=1.1)
    for options, error, name in (
        ({"do_sample": False, "top_k": 5}, ValueError, "top_k"),
        ({"temperature": "hot"}, TypeError, "temperature"),
        ({"temperature": 0, "top_k": -3}, ValueError, "top_k"),
        ({"num_beams": 2}, TypeError, "num_beams"),
    ):
        with pytest.raises(error, match=name):
            choose(options, {})
    with pytest.raises(ValueError, match="repetition_penalty"):
        choose({}, {"repetition_penalty": 0})


def test_any_type_of_number_is_taken():
    options = {"temperature": Fraction(1, 2), "top_p": Fraction(9, 10), "min_p": np.float32(0.25)}
    logits = torch.randn(2, 20)
    found = Sampler(Sampling(True, **options), torch.zeros(2, 1).long()).process(logits)
    plain = Sampling(True, temperature=0.5, top_p=0.9, min_p=0.25)
    assert torch.equal(found, Sampler(plain, torch.zeros(2, 1).long()).process(logits))
