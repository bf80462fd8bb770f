import torch

from helpers import BadCall, Sample, check_op, instruction_set, instruction_sets, needs_kernels
from mllama.ops import swiglu
from mllama.ops.swiglu import reference

torch.manual_seed(0)
GATE, UP = torch.randn(2, 3, 8)


def sample(*shape):
    return Sample((3 * torch.randn(shape), torch.randn(shape)))


def halves(rows, width):
    """Gate and up as one projection leaves them, side by side."""
    return Sample(tuple(torch.randn(rows, 2 * width).chunk(2, dim=-1)))


@needs_kernels
def test_swiglu():
    operators = torch.ops.mllama
    check_op(
        swiglu,
        reference,
        [sample(3, 64), halves(5, 77), sample(2, 3, 29), sample(0, 8), sample(), sample(40, 1000)],
        raw=[
            (operators.swiglu.default, (GATE.clone().requires_grad_(), UP)),
            (operators._swiglu_backward.default, (torch.randn(3, 8), GATE, UP)),
        ],
        bad_calls=[
            BadCall(lambda: swiglu(GATE, 1.0), TypeError, "up must be a torch.Tensor, got float"),
            BadCall(lambda: swiglu(GATE.double(), UP.double()), TypeError, "gate must be float32, bfloat16 or float16, got float64"),
            BadCall(lambda: swiglu(GATE, UP[:2]), ValueError, r"up must be as gate, \[3, 8\]"),
            BadCall(lambda: swiglu(GATE, UP.bfloat16()), ValueError, "up must be as gate"),
            BadCall(lambda: operators.swiglu(GATE, UP[:2]), ValueError, "up must be as gate"),
            BadCall(lambda: operators.swiglu(GATE.double(), UP.double()), ValueError, "gate must be float32"),
        ],
    )


@needs_kernels
def test_extreme_values():
    """Where the exponential ends, in both directions; NaN stays NaN."""
    gate = torch.tensor([-3e4, -200.0, -100.0, -88.0, -20.0, -0.0, 1e-30, 20.0, 88.0, 200.0, 3e4, float("inf"), float("nan")])
    ones = torch.ones_like(gate)
    for isa in instruction_sets():
        with instruction_set(isa):
            actual, expected = swiglu(gate, ones), reference(gate, ones)
            torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6, equal_nan=True)


@needs_kernels
def test_large_results():
    """Past 16 MiB results are stored around the caches: whole, in rows with gaps, with a tail."""
    whole = torch.randn(2050, 2 * 2051)
    for gate, up in (whole.chunk(2, dim=-1), (whole, whole.flip(0))):
        gate, up = gate.detach().requires_grad_(), up.detach().requires_grad_()
        actual, expected = swiglu(gate, up), reference(gate, up)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        gradients = zip(torch.autograd.grad(actual.sum(), (gate, up)), torch.autograd.grad(expected.sum(), (gate, up)), strict=True)
        for pair in gradients:
            torch.testing.assert_close(*pair, atol=1e-5, rtol=1e-5)


def test_matches_torch():
    torch.testing.assert_close(swiglu(GATE, UP), torch.nn.functional.silu(GATE) * UP)
