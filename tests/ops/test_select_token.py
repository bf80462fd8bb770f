"""select_token against its reference, which tests/runtime/test_sampler.py holds against
transformers.
"""

import math

import pytest
import torch

import devices
from helpers import instruction_set, instruction_sets, needs_kernels
from mllama.ops import select_token
from mllama.ops.select_token import draw, penalize, process, reference

# The emulator takes a thousand times as long.
LARGE, EQUALS, DRAWS = (5_000, 4, 100) if devices.is_emulated() else (50_000, 64, 20_000)
WAYS = [
    {},
    {"temperature": 0.3},
    {"top_k": 1},
    {"top_k": 7},
    {"top_k": 10**6},
    {"top_p": 0.9},
    {"top_p": 0.3},
    {"top_p": 0.0},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.7},
    {"temperature": 1.5, "top_k": 40, "top_p": 0.8, "min_p": 0.02, "repetition_penalty": 0.8},
]


def inputs(rows, size, dtype=torch.float32, scale=3.0, seed=0):
    generator = devices.generator(seed)
    logits = scale * torch.randn(rows, size, generator=generator)
    uniform = torch.rand(rows, dtype=torch.float64, generator=generator)
    present = torch.rand(rows, size, generator=generator) < 0.1
    return logits.to(dtype), uniform, present


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [1, 5, 50, 3000])
def test_tokens_are_the_references(size, dtype, options):
    logits, uniform, present = inputs(9, size, dtype)
    expected = reference(logits, uniform, present, **options)
    for isa in instruction_sets():
        with instruction_set(isa):
            assert torch.equal(select_token(logits, uniform, present, **options), expected)


@pytest.mark.parametrize("options", WAYS, ids=str)
@pytest.mark.parametrize("scale", [0.01, 1.0, 20.0])
def test_a_large_vocabulary(options, scale):
    logits, uniform, present = inputs(6, LARGE, scale=scale)
    found = select_token(logits, uniform, present, **options)
    assert torch.equal(found, exact(logits, uniform, present, **options))


def exact(logits, uniform, present=None, repetition_penalty=1.0, **options):
    """The reference in float64: sums of many float32 probabilities decide otherwise at the end."""
    scores = process(penalize(logits.double(), present, repetition_penalty), **options)
    return draw(scores.softmax(-1), uniform)


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.5}, {"top_p": 0.0}, {"min_p": 0.5}])
def test_equal_logits(options):
    """What is equal to the last of top-k stays; of top-p's, the first ones go."""
    _, uniform, _ = inputs(EQUALS, 1)
    levels = torch.randint(0, 3, (EQUALS, 4000), generator=devices.generator(1))
    for logits in (levels.float(), torch.zeros(EQUALS, 4000)):
        found = select_token(logits, uniform, **options)
        # What is drawn from is exact; where it ends, a sum may be rounded to the other side.
        assert ((found - exact(logits, uniform, **options)).abs() <= 2).all()


def test_the_likeliest_token():
    logits, _, present = inputs(5, 777)
    logits[0, 500] = logits[0, 20] = 50.0  # the first of equals
    logits[1, 776] = math.inf
    logits[2, [30, 9]] = math.nan
    logits[3] = -math.inf
    for isa in instruction_sets():
        with instruction_set(isa):
            found = select_token(logits).tolist()
            assert found == [20, 776, 9, 0, logits[4].argmax().item()]
            for penalty in (0.5, 3.0):
                found = select_token(logits, present=present, repetition_penalty=penalty)
                assert torch.equal(
                    found, reference(logits, present=present, repetition_penalty=penalty)
                )


@pytest.mark.parametrize("options", WAYS, ids=str)
def test_draws_are_as_frequent_as_their_probabilities(options):
    """Chi-square of the draws: the mean is the degrees of freedom, the variance twice that."""
    draws, size = DRAWS, 40
    logits, _, present = inputs(1, size, scale=1.0)
    uniform = torch.rand(draws, dtype=torch.float64, generator=devices.generator(5))
    rows = logits.expand(draws, -1), uniform, present.expand(draws, -1)
    counts = select_token(*rows, **options).bincount(minlength=size).double()
    own = dict(options)
    penalty = own.pop("repetition_penalty", 1.0)
    scores = torch.where(
        present, torch.where(logits < 0, logits * penalty, logits / penalty), logits
    )
    expected = process(scores, **own).softmax(-1)[0].double() * draws
    assert not counts[expected == 0].any()
    counts, expected = counts[expected > 0], expected[expected > 0]
    freedom = len(expected) - 1
    assert ((counts - expected) ** 2 / expected).sum() <= freedom + 4 * math.sqrt(2 * freedom)


def test_the_ends_of_the_range_of_uniform():
    logits = torch.tensor([[-math.inf, 1.0, 0.0, -math.inf]]).expand(2, -1)
    uniform = torch.tensor([0.0, 1 - 2**-53], dtype=torch.float64)
    for isa in instruction_sets():
        with instruction_set(isa):
            assert select_token(logits, uniform).tolist() == [1, 2]
    assert reference(logits, uniform).tolist() == [1, 2]


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads):
    logits, uniform, _ = inputs(7, 999)
    expected, before = select_token(logits, uniform, top_p=0.8), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert torch.equal(select_token(logits, uniform, top_p=0.8), expected)
    finally:
        torch.set_num_threads(before)


def test_no_rows():
    none = torch.zeros(0, dtype=torch.float64)
    assert select_token(torch.zeros(0, 9), none).shape == (0,)
    assert select_token(torch.zeros(0, 9)).dtype == torch.int64


@needs_kernels
def test_registration():
    logits, uniform, present = inputs(2, 30)
    numbers = (0.7, 5, 0.9, 0.1, 1.1)
    operator = torch.ops.mllama.select_token.default
    torch.library.opcheck(operator, (logits, uniform, present, *numbers))
    torch.library.opcheck(operator, (logits, None, None, *numbers))


LOGITS, UNIFORM = torch.zeros(2, 4), torch.zeros(2, dtype=torch.float64)


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    ("arguments", "options", "error", "name"),
    [
        ([None], {}, TypeError, "logits"),
        ([LOGITS.double()], {}, TypeError, "logits"),
        ([LOGITS[0]], {}, ValueError, "logits"),
        ([LOGITS[:, :0]], {}, ValueError, "logits"),
        ([LOGITS, UNIFORM.float()], {}, TypeError, "uniform"),
        ([LOGITS, UNIFORM[:1]], {}, ValueError, "uniform"),
        ([LOGITS, UNIFORM, LOGITS], {}, TypeError, "present"),
        ([LOGITS, UNIFORM, LOGITS[:1].bool()], {}, ValueError, "present"),
        ([LOGITS / 0, UNIFORM], {}, ValueError, "logits"),
        ([LOGITS + math.inf, UNIFORM], {}, ValueError, "logits"),
        ([LOGITS - math.inf, UNIFORM], {}, ValueError, "logits"),
        ([LOGITS], {"temperature": 0}, ValueError, "temperature"),
        ([LOGITS], {"top_k": -1}, ValueError, "top_k"),
        ([LOGITS], {"top_k": 2**63}, ValueError, "top_k"),
        ([LOGITS], {"top_p": 1.5}, ValueError, "top_p"),
        ([LOGITS], {"min_p": math.nan}, ValueError, "min_p"),
        ([LOGITS], {"repetition_penalty": math.inf}, ValueError, "repetition_penalty"),
    ],
)
def test_refusals(arguments, options, error, name, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr("mllama.ops._dispatch._EXTENSION", None)
    elif devices.is_emulated() and len(arguments) == 2 and not arguments[0].amax().isfinite():
        assert select_token(*arguments).tolist() == [-1, -1]  # a device is not waited for
        return
    with pytest.raises(error, match=f"select_token: .*{name}"):
        select_token(*arguments, **options)
