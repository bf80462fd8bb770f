import pytest
import torch

from helpers import BadCall, Sample, check_op, needs_kernels
from mllama.ops import add_rms_norm, rms_norm
from mllama.ops.rms_norm import add_reference, reference

torch.manual_seed(0)
SHAPES = [(3, 64), (2, 5, 77), (40, 16 + 13), (1,), (0, 8), (130, 100)]


def norm_sample(shape):
    return Sample((torch.randn(shape), torch.randn(shape[-1])), {"eps": 1e-5})


def add_sample(shape):
    return Sample((torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])))


X, W = torch.randn(4, 8), torch.randn(8)


@needs_kernels
@pytest.mark.parametrize("keep_weight", [(), (1,)], ids=["weight as x", "f32 weight"])
def test_rms_norm(keep_weight):
    operators = torch.ops.mllama
    y, rstd = operators.rms_norm(X, W, 1e-5)
    check_op(
        rms_norm,
        reference,
        [norm_sample(shape) for shape in SHAPES],
        keep_float32=keep_weight,
        raw=[
            (operators.rms_norm.default, (X, W.clone().requires_grad_(), 1e-5)),
            (operators._rms_norm_backward.default, (torch.randn(4, 8), None, X, W, rstd, True)),
        ],
        bad_calls=[
            BadCall(lambda: rms_norm([1.0], W), TypeError, "x must be a torch.Tensor, got list"),
            BadCall(lambda: rms_norm(X.double(), W), TypeError, "x must be float32, bfloat16 or float16, got float64"),
            BadCall(lambda: rms_norm(X, W.int()), TypeError, "weight must be float32, bfloat16 or float16, got int32"),
            BadCall(lambda: rms_norm(X, W, "a"), TypeError, "eps must be a number, got str"),
            BadCall(lambda: rms_norm(X, W, -1.0), ValueError, "eps must be finite and not negative"),
            BadCall(lambda: rms_norm(X, W, float("nan")), ValueError, "eps must be finite and not negative"),
            BadCall(lambda: rms_norm(X, W[:3]), ValueError, r"weight must be \[8\]"),
            BadCall(lambda: operators.rms_norm(X, W[:3], 1e-5), ValueError, r"weight must be \[8\]"),
            BadCall(lambda: operators.rms_norm(X.double(), W, 1e-5), ValueError, "x must be float32"),
        ],
    )


@needs_kernels
def test_add_rms_norm():
    check_op(
        add_rms_norm,
        add_reference,
        [add_sample(shape) for shape in SHAPES],
        raw=[(torch.ops.mllama.add_rms_norm.default, (X.clone().requires_grad_(), torch.randn(4, 8), W, 1e-5))],
        bad_calls=[
            BadCall(lambda: add_rms_norm(X, X[:2], W), ValueError, "residual must be as x"),
            BadCall(lambda: add_rms_norm(X, X.bfloat16(), W), ValueError, "residual must be as x"),
            BadCall(lambda: add_rms_norm(X, None, W), TypeError, "residual"),
        ],
    )


def test_frozen_weight_gets_no_gradient():
    x = X.clone().requires_grad_()
    rms_norm(x, W).sum().backward()
    assert x.grad is not None and W.grad is None


def test_matches_torch():
    torch.testing.assert_close(rms_norm(X, W, 1e-5), torch.nn.functional.rms_norm(X, (8,), W, 1e-5))


def test_rows_of_no_elements():
    x, weight = torch.zeros(5, 0, requires_grad=True), torch.zeros(0, requires_grad=True)
    y, hidden = add_rms_norm(x, x, weight)
    (rms_norm(x, weight).sum() + y.sum() + hidden.sum()).backward()
    assert x.grad.shape == (5, 0) and weight.grad.shape == (0,)
