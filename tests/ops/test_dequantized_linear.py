import pytest
import torch
from torch.nn.functional import linear

import devices
from helpers import BadCall, Sample, check_op, instruction_set, instruction_sets, needs_kernels
from mllama.ops import dequantized_linear, packed_linear, unpack_weight
from mllama.ops.dequantized_linear import reference
from mllama.ops.packed_layout import PACKINGS, pack

torch.manual_seed(0)
X, PACKED, B = torch.randn(2, 40), pack(torch.randn(20, 40), "int4"), torch.randn(20)


def packed_weight(out, width, packing):
    weight = torch.randn(out, width, generator=devices.generator(0)) * max(width, 1) ** -0.5
    return pack(weight, packing)


def sample(packing, out, width, lead, bias=True):
    arguments = torch.randn(*lead, width), packed_weight(out, width, packing)
    options = {"out_features": out, "packing": packing}
    return Sample((*arguments, torch.randn(out) if bias else None), options)


def call(x=X, packed=PACKED, bias=B, out_features=20, packing="int4"):
    return dequantized_linear(x, packed, bias, out_features=out_features, packing=packing)


@needs_kernels
@pytest.mark.parametrize("packing", PACKINGS)
def test_dequantized_linear(packing):
    number = PACKINGS[packing].number
    packed = packed_weight(20, 40, packing)
    operators = torch.ops.mllama
    check_op(
        dequantized_linear,
        reference,
        [
            sample(packing, 37, 100, (2, 3)),
            sample(packing, 16, 32, (5,), bias=False),
            sample(packing, 50, 515, (140,)),
            sample(packing, 1, 1, ()),
            sample(packing, 8, 64, (0, 2)),
            sample(packing, 20, 0, (3,)),
        ],
        differentiable=(0, 2),
        keep_float32=(2,),
        thread_counts=(),  # the matrix product is torch's
        raw=[
            (
                operators.dequantized_linear.default,
                (torch.randn(2, 40).requires_grad_(), packed, torch.randn(20), 20, number),
            ),
            (
                operators._dequantized_linear_backward.default,
                (torch.randn(2, 20), packed, 40, number),
            ),
        ],
        bad_calls=[
            BadCall(lambda: call(x=None), TypeError, "x"),
            BadCall(lambda: call(x=X.int()), TypeError, "x"),
            BadCall(lambda: call(x=torch.tensor(1.0)), ValueError, "x"),
            BadCall(lambda: call(packed=PACKED.float()), TypeError, "weight"),
            BadCall(lambda: call(packed=PACKED[1:]), ValueError, "weight"),
            BadCall(lambda: call(out_features=40), ValueError, "weight"),
            BadCall(lambda: call(packing="int8"), ValueError, "weight"),
            BadCall(lambda: call(packing="int3"), ValueError, "packing"),
            BadCall(lambda: call(bias=B[1:]), ValueError, "bias"),
        ],
    )


@needs_kernels
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("size", [(1200, 2080), (16400, 70), (70, 40000)])
def test_weights_of_several_tiles(packing, size):
    """Their products and gradients are those with the dense weight."""
    packed = packed_weight(*size, packing)
    x = torch.randn(3, size[1], requires_grad=True)
    for isa in instruction_sets()[-1:]:
        with instruction_set(isa):
            y = dequantized_linear(x, packed, out_features=size[0], packing=packing)
            expected = linear(x, unpack_weight(packed, *size, packing))
    slope = torch.randn_like(y)
    pairs = (y, expected), [torch.autograd.grad(one, x, slope)[0] for one in (y, expected)]
    for actual, wanted in pairs:
        assert (actual - wanted).abs().max() <= 4e-6 * wanted.abs().max()


@needs_kernels
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    """As nn.Linear: computes in autocast's dtype, and gives the gradient in x's."""
    device = devices.tensor_device()
    x = X.to(device).requires_grad_()
    packed, bias = PACKED.to(device), B.to(device)
    with torch.autocast(torch.device(device).type, dtype):
        y = call(x, packed, bias)
    expected = call(x.to(dtype), packed, bias)
    assert y.dtype == dtype and torch.equal(y, expected)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    assert gradient.dtype == torch.float32 and gradient.abs().max() > 0


@needs_kernels
def test_inputs_are_not_rounded():
    x = torch.tensor([[1.0, 1e-3] + 30 * [0.0]])
    packed = pack(torch.eye(16, 32), "int8")
    y = dequantized_linear(x, packed, out_features=16, packing="int8")
    torch.testing.assert_close(y[0, :2], x[0, :2], rtol=1e-3, atol=0)
    assert packed_linear(x, packed, out_features=16, packing="int8")[0, 1] == 0


def test_packed_linear_names_what_has_a_derivative():
    x = X.clone().requires_grad_()
    y = packed_linear(x, PACKED, B, out_features=20, packing="int4")
    if y.grad_fn.__class__.__name__.startswith("AddmmBackward"):
        pytest.skip("the reference has a derivative")
    with pytest.raises(NotImplementedError, match="dequantized_linear"):
        y.sum().backward()
