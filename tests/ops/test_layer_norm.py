import pytest
import torch

from helpers import THROWN, BadCall, Sample, check_op, needs_kernels
from mllama.ops import layer_norm
from mllama.ops.layer_norm import reference

torch.manual_seed(0)
SHAPES = [(3, 64), (2, 5, 77), (40, 16 + 13), (5,), (0, 8), (130, 100), (3, 1032), (2, 517)]
X, W, B = torch.randn(4, 8), torch.randn(8), torch.randn(8)


def sample(shape):
    return Sample(
        (torch.randn(shape), torch.randn(shape[-1]), torch.randn(shape[-1])), {"eps": 1e-5}
    )


@needs_kernels
@pytest.mark.parametrize(
    "keep", [(), (1, 2), (2,)], ids=["parameters as x", "f32 parameters", "f32 bias"]
)
def test_layer_norm(keep):
    operators = torch.ops.mllama
    statistics = operators.layer_norm(X, W, B, 1e-5)[1]
    check_op(
        layer_norm,
        reference,
        [sample(shape) for shape in SHAPES],
        keep_float32=keep,
        raw=[
            (operators.layer_norm.default, (X, W.clone().requires_grad_(), B, 1e-5)),
            (
                operators._layer_norm_backward.default,
                (torch.randn(4, 8), X, W, B, statistics, True),
            ),
            (
                operators._layer_norm_backward.default,
                (torch.randn(4, 8), X, W, B, statistics, False),
            ),
        ],
        bad_calls=[
            BadCall(
                lambda: layer_norm([1.0], W, B), TypeError, "x must be a torch.Tensor, got list"
            ),
            BadCall(
                lambda: layer_norm(X.double(), W, B),
                TypeError,
                "x must be float32, bfloat16 or float16, got float64",
            ),
            BadCall(
                lambda: layer_norm(X, W, B.int()),
                TypeError,
                "bias must be float32, bfloat16 or float16, got int32",
            ),
            BadCall(lambda: layer_norm(X, W, None), TypeError, "bias"),
            BadCall(lambda: layer_norm(X, W[:3], B), ValueError, r"weight must be \[8\]"),
            BadCall(lambda: layer_norm(X, W, B[:3]), ValueError, r"bias must be \[8\]"),
            BadCall(
                lambda: layer_norm(torch.tensor(1.0), W, B),
                ValueError,
                "x must have at least one dimension",
            ),
            BadCall(lambda: operators.layer_norm(X, W, B[:3], 1e-5), THROWN, "invalid bias"),
            BadCall(lambda: operators.layer_norm(X.double(), W, B, 1e-5), THROWN, "invalid x"),
        ],
    )


def test_large_mean_keeps_its_variance():
    """The mean of squares less the squared mean would leave nothing here."""
    x = torch.randn(4, 100, dtype=torch.float64) + 1000
    expected = torch.nn.functional.layer_norm(x, (100,), eps=1e-5)
    actual = layer_norm(x.float(), torch.ones(100), torch.zeros(100), 1e-5)
    torch.testing.assert_close(actual.double(), expected, atol=2e-3, rtol=0)


@needs_kernels
@pytest.mark.parametrize("width", [77, 1032])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_float32(dtype, width):
    """The sums too, whatever x is."""
    x = (torch.randn(9, width) + 1).to(dtype)
    ones = torch.ones(width)
    mean, rstd = torch.ops.mllama.layer_norm(x, ones, ones, 1e-5)[1].view(9, 2).double().unbind(1)
    exact = x.double()
    torch.testing.assert_close(mean, exact.mean(-1), rtol=1e-6, atol=1e-6)
    variance = exact.var(-1, correction=0)
    torch.testing.assert_close(rstd, (variance + 1e-5).rsqrt(), rtol=1e-6, atol=0)


def test_frozen_parameters_get_no_gradient():
    x = X.clone().requires_grad_()
    layer_norm(x, W, B).sum().backward()
    assert x.grad is not None and W.grad is None and B.grad is None


def test_matches_torch():
    torch.testing.assert_close(
        layer_norm(X, W, B, 1e-5), torch.nn.functional.layer_norm(X, (8,), W, B, 1e-5)
    )


def test_rows_of_no_elements():
    x, weight, bias = (torch.zeros(shape, requires_grad=True) for shape in ((5, 0), (0,), (0,)))
    layer_norm(x, weight, bias).sum().backward()
    assert x.grad.shape == (5, 0) and weight.grad.shape == bias.grad.shape == (0,)
