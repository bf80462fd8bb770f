"""swiglu and geglu: two activations of one operator shape, so one test for both."""

import pytest
import torch

import devices
from helpers import (
    THROWN,
    BadCall,
    Sample,
    check_op,
    instruction_set,
    instruction_sets,
    needs_kernels,
)
from mllama.ops import geglu, swiglu
from mllama.ops.gated import geglu_reference, swiglu_reference

torch.manual_seed(0)
GATE, UP = torch.randn(2, 3, 8)
SHAPES = [(3, 64), (2, 3, 29), (0, 8), (), (40, 1000)]
both = pytest.mark.parametrize(
    ("gated", "reference"),
    [(swiglu, swiglu_reference), (geglu, geglu_reference)],
    ids=["swiglu", "geglu"],
)


def sample(*shape):
    return Sample((3 * torch.randn(shape), torch.randn(shape)))


def odd_rows(rows, width):
    """Gate has rows an odd number of elements apart, up has none between its rows."""
    return Sample((torch.randn(rows, width + 1)[:, :width], torch.randn(rows, width)))


def halves(rows, width):
    """Gate and up as one projection leaves them, side by side."""
    return Sample(tuple(torch.randn(rows, 2 * width).chunk(2, dim=-1)))


@needs_kernels
@both
def test_gated(gated, reference):
    operator = getattr(torch.ops.mllama, gated.__name__).default
    backward = getattr(torch.ops.mllama, f"_{gated.__name__}_backward").default
    check_op(
        gated,
        reference,
        [halves(5, 77), halves(6, 48), odd_rows(6, 48), *(sample(*shape) for shape in SHAPES)],
        raw=[
            (operator, (GATE.clone().requires_grad_(), UP)),
            (backward, (torch.randn(3, 8), GATE, UP)),
        ],
        bad_calls=[
            BadCall(lambda: gated(GATE, 1.0), TypeError, "up must be a torch.Tensor, got float"),
            BadCall(
                lambda: gated(GATE.double(), UP.double()),
                TypeError,
                "gate must be float32, bfloat16 or float16, got float64",
            ),
            BadCall(
                lambda: gated(GATE, UP[:2]),
                ValueError,
                r"up must be as gate, \[3, 8\] of float32, got \[2, 8\]",
            ),
            BadCall(
                lambda: gated(GATE, UP.bfloat16()),
                ValueError,
                r"up must be as gate, .* got \[3, 8\] of bfloat16",
            ),
            BadCall(lambda: operator(GATE, UP[:2]), THROWN, "invalid up"),
            BadCall(lambda: operator(GATE.double(), UP.double()), THROWN, "invalid gate"),
        ],
    )


@needs_kernels
@both
def test_extreme_values(gated, reference):
    """Where the exponential ends, in both directions; NaN stays NaN."""
    gate = torch.tensor(
        [
            -3e4,
            -200.0,
            -100.0,
            -88.0,
            -20.0,
            -0.0,
            1e-30,
            20.0,
            88.0,
            200.0,
            3e4,
            float("inf"),
            float("nan"),
        ]
    )
    ones = torch.ones_like(gate)
    for isa in instruction_sets():
        with instruction_set(isa):
            torch.testing.assert_close(
                gated(gate, ones), reference(gate, ones), atol=1e-6, rtol=1e-6, equal_nan=True
            )


@needs_kernels
@both
@pytest.mark.skipif(devices.is_emulated(), reason="only the CPU's kernels store in another way")
def test_large_results(gated, reference):
    """Past 16 MiB results are stored around the caches: whole, in rows with gaps, with a tail."""
    whole = torch.randn(2050, 2 * 2051)
    for gate, up in (whole.chunk(2, dim=-1), (whole, whole.flip(0))):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        actual, expected = gated(gate, up), reference(gate, up)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        gradients = zip(
            torch.autograd.grad(actual.sum(), (gate, up)),
            torch.autograd.grad(expected.sum(), (gate, up)),
            strict=True,
        )
        for pair in gradients:
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


def test_match_torch():
    torch.testing.assert_close(swiglu(GATE, UP), torch.nn.functional.silu(GATE) * UP)
    torch.testing.assert_close(
        geglu(GATE, UP), torch.nn.functional.gelu(GATE, approximate="tanh") * UP
    )
