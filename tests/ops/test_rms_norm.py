import pytest
import torch
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from helpers import (
    THROWN,
    BadCall,
    Sample,
    assert_close,
    check_op,
    instruction_set,
    instruction_sets,
    needs_kernels,
)
from mllama.nn.norm import RMSNorm
from mllama.ops import add_rms_norm, rms_norm
from mllama.ops.rms_norm import add_reference, reference

torch.manual_seed(0)
SHAPES = [(3, 64), (2, 5, 77), (40, 16 + 13), (1,), (0, 8), (130, 100), (3, 1032), (2, 517)]


def norm_sample(shape, **options):
    torch.manual_seed(
        0
    )  # each for itself: near 0 the gradient of a row of one element is all cancellation
    return Sample((torch.randn(shape), torch.randn(shape[-1])), {"eps": 1e-5, **options})


def add_sample(shape, **options):
    torch.manual_seed(0)
    return Sample((torch.randn(shape), torch.randn(shape), torch.randn(shape[-1])), options)


X, W = torch.randn(4, 8), torch.randn(8)


@needs_kernels
@pytest.mark.parametrize("keep_weight", [(), (1,)], ids=["weight as x", "f32 weight"])
def test_rms_norm(keep_weight):
    operators = torch.ops.mllama
    y, rstd = operators.rms_norm(X, W, 1e-5, 1.0)
    check_op(
        rms_norm,
        reference,
        [
            norm_sample((3, 29), offset=1.0),
            *(norm_sample(shape) for shape in SHAPES),
            norm_sample((40, 64), offset=-0.5),
        ],
        keep_float32=keep_weight,
        raw=[
            (operators.rms_norm.default, (X, W.clone().requires_grad_(), 1e-5, 1.0)),
            (
                operators._rms_norm_backward.default,
                (torch.randn(4, 8), None, X, W, rstd, 1.0, True),
            ),
        ],
        bad_calls=[
            BadCall(lambda: rms_norm([1.0], W), TypeError, "x must be a torch.Tensor, got list"),
            BadCall(
                lambda: rms_norm(X.double(), W),
                TypeError,
                "x must be float32, bfloat16 or float16, got float64",
            ),
            BadCall(
                lambda: rms_norm(X, W.int()),
                TypeError,
                "weight must be float32, bfloat16 or float16, got int32",
            ),
            BadCall(lambda: rms_norm(X, W, "a"), TypeError, "eps must be a number, got str"),
            BadCall(
                lambda: rms_norm(X, W, -1.0), ValueError, "eps must be finite and not negative"
            ),
            BadCall(
                lambda: rms_norm(X, W, float("nan")),
                ValueError,
                "eps must be finite and not negative",
            ),
            BadCall(
                lambda: rms_norm(X, W, offset=True), TypeError, "offset must be a number, got bool"
            ),
            BadCall(
                lambda: rms_norm(X, W, offset=float("inf")),
                ValueError,
                "offset must be finite, got inf",
            ),
            BadCall(lambda: rms_norm(X, W[:3]), ValueError, r"weight must be \[8\]"),
            BadCall(lambda: operators.rms_norm(X, W[:3], 1e-5, 0.0), THROWN, "invalid weight"),
            BadCall(lambda: operators.rms_norm(X.double(), W, 1e-5, 0.0), THROWN, "invalid x"),
        ],
    )


@needs_kernels
def test_add_rms_norm():
    check_op(
        add_rms_norm,
        add_reference,
        [add_sample((3, 29), offset=1.0), *(add_sample(shape) for shape in SHAPES)],
        raw=[
            (
                torch.ops.mllama.add_rms_norm.default,
                (X.clone().requires_grad_(), torch.randn(4, 8), W, 1e-5, 1.0),
            )
        ],
        bad_calls=[
            BadCall(lambda: add_rms_norm(X, X[:2], W), ValueError, "residual must be as x"),
            BadCall(lambda: add_rms_norm(X, X.bfloat16(), W), ValueError, "residual must be as x"),
            BadCall(lambda: add_rms_norm(X, None, W), TypeError, "residual"),
            BadCall(
                lambda: add_rms_norm(X, X, W, offset="1"),
                TypeError,
                "offset must be a number, got str",
            ),
        ],
    )


def gemma_norm(size, dtype):
    norm = GemmaRMSNorm(size).to(dtype)
    torch.nn.init.normal_(norm.weight)
    return norm


@needs_kernels
@pytest.mark.parametrize("size", [29, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gemma_bit_for_bit(dtype, size):
    """Where the sum of squares is exact in any order nothing but the two forms' own rounding could
    differ, and nothing does.
    """
    with torch.device("cpu"):  # where torch's rsqrt is exact
        module = gemma_norm(size, dtype)

    def gemma(x):
        return module(x.cpu()).to(x.device)

    x, residual = (torch.randint(-16, 17, (2, 50, size)) / 8).to(dtype).unbind()
    weight = module.weight.to(x.device)
    for isa in instruction_sets():
        with instruction_set(isa):
            assert torch.equal(rms_norm(x, weight, offset=1.0), gemma(x)), isa
            y, hidden = add_rms_norm(x, residual, weight, offset=1.0)
            assert torch.equal(hidden, x + residual) and torch.equal(y, gemma(hidden)), isa
    assert torch.equal(reference(x.cpu(), module.weight, offset=1.0), module(x.cpu()))


@needs_kernels
@pytest.mark.parametrize("size", [29, 64, 520])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_llama_bit_for_bit(dtype, size):
    """As for Gemma. What is normalized is rounded before it meets the weight."""
    llama = LlamaRMSNorm(size).to(dtype)
    torch.nn.init.normal_(llama.weight)
    x = (torch.randint(-16, 17, (50, size)) / 8).to(dtype)
    for isa in instruction_sets():
        with instruction_set(isa):
            assert torch.equal(rms_norm(x, llama.weight), llama(x)), isa


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gemma_rounds_once(dtype):
    """On any values at most one in a thousand lands on the other side of a rounding; Llama's order
    would move one in five.
    """
    gemma, x = gemma_norm(256, dtype), torch.randn(200, 256, dtype=dtype)
    ours, theirs = rms_norm(x, gemma.weight, offset=1.0), gemma(x)
    assert (ours != theirs).float().mean() < 1e-3
    assert (rms_norm(x, 1 + gemma.weight) != theirs).float().mean() > 0.1


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gemma_gradients(dtype):
    gemma, x = gemma_norm(64, torch.float32), torch.randn(10, 64, requires_grad=True)
    expected = torch.autograd.grad(gemma(x).square().sum(), (x, gemma.weight))
    actual = torch.autograd.grad(
        rms_norm(x.to(dtype), gemma.weight.to(dtype), offset=1.0).square().sum(), (x, gemma.weight)
    )
    for a, b in zip(actual, expected, strict=True):
        assert_close(a, b, 1e-5 if dtype == torch.float32 else 3e-2, "gradient")


@needs_kernels
@pytest.mark.parametrize("width", [77, 1032])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_statistics_are_float32(dtype, width):
    """The sum of squares too, whatever x is; that of a sum is of its rounded elements."""
    x, residual = torch.randn(2, 9, width).to(dtype).unbind()
    _, hidden, rstd = torch.ops.mllama.add_rms_norm(x, residual, torch.ones(width), 1e-5, 0.0)
    exact = (hidden.double().square().mean(-1) + 1e-5).rsqrt()
    torch.testing.assert_close(rstd.flatten().double(), exact, rtol=1e-6, atol=0)


def test_module_starts_at_scale_one():
    for offset in (0.0, 1.0):
        norm = RMSNorm(8, 1e-5, offset)
        assert torch.all(norm.weight + offset == 1)
        assert torch.equal(norm(X), rms_norm(X, norm.weight, 1e-5, offset))
        assert torch.equal(norm.add(X, X)[0], rms_norm(X + X, norm.weight, 1e-5, offset))
    assert (
        repr(norm) == "RMSNorm(8, eps=1e-05, offset=1.0)"
        and repr(RMSNorm(8)) == "RMSNorm(8, eps=1e-06)"
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


def test_several_offsets_in_one_compiled_function():
    """The second makes it a symbol."""
    torch._dynamo.reset()
    x, weight = torch.randn(3, 16), torch.randn(16)
    compiled = torch.compile(rms_norm, fullgraph=True, backend="aot_eager")
    for offset in (1.0, 0.0, 0.5):
        assert torch.equal(compiled(x, weight, 1e-6, offset), rms_norm(x, weight, 1e-6, offset))
