import pytest
import torch

import devices
from helpers import BadCall, Sample, check_op, instruction_set, instruction_sets, needs_kernels
from mllama import _ext
from mllama.ops import _dispatch, dequantized_linear, pack_weight, packed_linear, unpack_weight
from mllama.ops.packed_layout import PACKINGS, pack, packed_bytes, unpack
from mllama.ops.packed_linear import PACKED_ACTIVATIONS, reference

SIZES = [(37, 100), (16, 32), (64, 576), (1, 1), (15, 33), (100, 260)]
# Of the weight's own size: what rounding to these formats may cost on normal numbers.
ERROR = {"f32": 0, "bf16": 2e-3, "f16": 3e-4, "int8": 7e-3, "int4": 8e-2, "q4_0": 0.1, "q4_1": 9e-2}
ERROR |= {"q5_0": 5e-2, "q5_1": 5e-2, "q4_k": 8e-2, "q5_k": 4e-2, "q6_k": 2e-2}


def weight(out, width, seed=0):
    generator = devices.generator(seed)
    return torch.randn(out, width, generator=generator) * width**-0.5


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("size", SIZES)
def test_reference_holds_the_weight(packing, size):
    w = weight(*size)
    packed = pack(w, packing)
    assert packed.shape == (packed_bytes(*size, packing),)
    error = (unpack(packed, *size, packing) - w).norm() / w.norm()
    assert error <= ERROR[packing]


@needs_kernels
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_packing_equals_the_reference(packing, dtype):
    for isa in instruction_sets():
        for size in SIZES:
            with instruction_set(isa):
                check_packing(weight(*size).to(dtype), packing)


def check_packing(w, packing):
    packed = pack_weight(w, packing)
    dense = unpack_weight(packed, *w.shape, packing)
    torch.testing.assert_close(dense, unpack(packed, *w.shape, packing), rtol=1e-6, atol=1e-7)
    theirs = unpack(pack(w, packing), *w.shape, packing)
    # A value half way between two codes may get either.
    assert ((dense - theirs).abs() > 1e-6).float().mean() <= 0.01
    rows = torch.tensor([len(w) - 1, 0, len(w) // 2])
    assert torch.equal(unpack_weight(packed, *w.shape, packing, rows=rows), dense[rows])
    halves = unpack_weight(packed, *w.shape, packing, dtype=torch.bfloat16)
    assert torch.equal(halves, dense.bfloat16())


@pytest.mark.parametrize("packing", PACKINGS)
def test_packing_without_a_kernel_takes_a_few_rows_at_a_time(packing, monkeypatch):
    monkeypatch.setattr(_dispatch, "_EXTENSION", None)
    monkeypatch.setitem(pack_weight.__globals__, "_VALUES_AT_ONCE", 40 * 20)
    w = weight(50, 40)
    assert torch.equal(pack_weight(w, packing), pack(w, packing))
    w[49, 3] = torch.inf
    with pytest.raises(ValueError, match="weight has values"):
        pack_weight(w, packing)


def sample(packing, out, width, lead, bias=True, activation=None):
    packed = pack(weight(out, width), packing)
    return Sample(
        (torch.randn(*lead, width), packed, torch.randn(out) if bias else None),
        {"out_features": out, "packing": packing, "activation": activation},
    )


X, PACKED, B = torch.randn(2, 40), pack(weight(20, 40), "int4"), torch.randn(20)


def call(x=X, packed=PACKED, bias=B, out_features=20, packing="int4", **more):
    return packed_linear(x, packed, bias, out_features=out_features, packing=packing, **more)


@needs_kernels
@pytest.mark.parametrize("packing", PACKINGS)
def test_packed_linear(packing):
    number = PACKINGS[packing].number
    check_op(
        packed_linear,
        reference,
        [
            sample(packing, 37, 100, (1,)),
            sample(packing, 16, 32, (2, 3), bias=False),
            sample(packing, 64, 576, (9,)),
            sample(packing, 5, 33, (130,), activation="gelu"),
            sample(packing, 37, 96, (3,), activation="gelu"),
            sample(packing, 37, 96, (3,), bias=False, activation="gelu_pytorch_tanh"),
            sample(packing, 50, 100, (140,), bias=False, activation="gelu_pytorch_tanh"),
            sample(packing, 50, 96, (140,), activation="quick_gelu"),
            sample(packing, 100, 300, (2, 65)),  # many rows; panels and chunks that are not whole
            sample(packing, 48, 64, (32,), bias=False),
            sample(packing, 17, 515, (3, 11)),
            sample(packing, 8, 64, (0, 2)),
            sample(packing, 3, 7, ()),
        ],
        differentiable=(),
        keep_float32=("bias",),
        raw=[
            (
                torch.ops.mllama.packed_linear.default,
                (torch.randn(2, 40), pack(weight(20, 40), packing), torch.randn(20), 20, number, 0),
            ),
            (
                torch.ops.mllama.unpack_weight.default,
                (pack(weight(20, 40), packing), None, 20, 40, number, torch.float32),
            ),
        ],
        bad_calls=[
            BadCall(lambda: call(x=None), TypeError, "x"),
            BadCall(lambda: call(x=X.int()), TypeError, "x"),
            BadCall(lambda: call(x=torch.tensor(1.0)), ValueError, "x"),
            BadCall(lambda: call(packed=PACKED.float()), TypeError, "weight"),
            BadCall(lambda: call(packed=PACKED[1:]), ValueError, "weight"),
            BadCall(
                lambda: call(packed=PACKED.repeat_interleave(2)[::2]), ValueError, "contiguous"
            ),
            BadCall(lambda: call(out_features=40), ValueError, "weight"),
            BadCall(lambda: call(packing="int8"), ValueError, "weight"),
            BadCall(lambda: call(packing="int3"), ValueError, "packing"),
            BadCall(lambda: call(bias=B[1:]), ValueError, "bias"),
            BadCall(lambda: call(activation="relu"), ValueError, "activation"),
            BadCall(lambda: pack_weight(X[0], "int4"), ValueError, "weight"),
            BadCall(lambda: pack_weight(X.int(), "int4"), TypeError, "weight"),
            BadCall(lambda: pack_weight(X * 1e30, "int4"), ValueError, "weight"),
            BadCall(lambda: pack_weight(X / 0, "int8"), ValueError, "weight"),
            BadCall(lambda: unpack_weight(PACKED, 20, 70, "int4"), ValueError, "weight"),
        ],
    )


@needs_kernels
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_up_to_sixteen_rows_have_the_bits_that_each_has_alone(packing, dtype):
    packed, how = pack(weight(37, 300), packing), {"out_features": 37, "packing": packing}
    x = torch.randn(16, 300, generator=devices.generator(1)).to(dtype)
    for isa in instruction_sets():
        with instruction_set(isa):
            alone = torch.cat([packed_linear(row[None], packed, **how) for row in x])
            for rows in range(2, 17):
                assert torch.equal(packed_linear(x[:rows], packed, **how), alone[:rows]), rows


@needs_kernels
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("packing", ["int8", "int4", "bf16"])
def test_what_is_not_finite_in_x_is_not_finite_in_y(packing, value):
    for rows in (2, 40):
        x = torch.randn(rows, 40)
        x[0, 33] = value
        y = packed_linear(x, pack(weight(20, 40), packing), out_features=20, packing=packing)
        assert not y[0].isfinite().any() and y[1:].isfinite().all()


@needs_kernels
@pytest.mark.parametrize("packing", PACKINGS)
def test_registration_of_pack_weight(packing):
    arguments = weight(20, 40).cpu(), PACKINGS[packing].number  # other devices have no kernel
    torch.library.opcheck(torch.ops.mllama.pack_weight.default, arguments)


def test_no_rows():
    assert unpack_weight(PACKED, 20, 40, "int4", rows=torch.zeros(0).long()).shape == (0, 40)


@pytest.mark.skipif(
    devices.tensor_device() == "cuda", reason="ends a GPU's process: see tests/cuda/test_gpu.py"
)
def test_rows_that_are_not_there():
    for rows in (torch.tensor([20]), torch.tensor([-1])):
        with pytest.raises(IndexError, match="rows"):
            unpack_weight(PACKED, 20, 40, "int4", rows=rows)


@needs_kernels
@pytest.mark.parametrize("packing", PACKINGS)
def test_weights_without_inputs(packing):
    packed = pack_weight(torch.empty(20, 0), packing)
    assert torch.equal(packed, pack(torch.empty(20, 0), packing))
    for rows in (2, 40):
        y = packed_linear(torch.randn(rows, 0), packed, B, out_features=20, packing=packing)
        assert torch.equal(y, B.expand(rows, 20))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize("packing", PACKINGS)
def test_a_weight_may_begin_at_any_byte(packing, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr(_dispatch, "_EXTENSION", None)
    w, x = pack(weight(20, 40), packing), torch.randn(30, 40)
    part = torch.cat([w[:5], w])[5:]
    size = {"out_features": 20, "packing": packing}
    assert torch.equal(unpack_weight(part, 20, 40, packing), unpack_weight(w, 20, 40, packing))
    for product in (packed_linear, dequantized_linear):
        assert torch.equal(product(x, part, **size), product(x, w, **size))


@needs_kernels
def test_features_whose_bytes_overflow():
    empty = torch.empty(0, dtype=torch.uint8)
    with pytest.raises((ValueError, RuntimeError), match="out"):  # the first up to torch 2.14
        torch.ops.mllama.unpack_weight(empty, torch.tensor([0, 5]), 2**58, 1, 0, torch.float32)


@needs_kernels
@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("size", [3e-8, 1e-6, 1e-5, 1e-4, 1, 1e3])
def test_small_and_large_weights(packing, size):
    """Scales that float16 has few digits for cost no more than half of its smallest number, beside
    the format's own error.
    """
    w = weight(20, 512) * 512**0.5 * size
    for packed in (pack(w, packing), pack_weight(w, packing)):
        error = (unpack_weight(packed, 20, 512, packing) - w).norm() / w.numel() ** 0.5
        assert error <= 1.5 * ERROR[packing] * size + 2**-25


@needs_kernels
def test_subnormal_inputs_stay_small():
    x = torch.full((2, 40), 1e-39)
    x[0, ::3] = 0
    for function in (packed_linear, reference):
        assert function(x, PACKED, out_features=20, packing="int4").abs().max() < 1e-37


@needs_kernels
@pytest.mark.parametrize("activation", PACKED_ACTIVATIONS)
@pytest.mark.parametrize("isa", instruction_sets() if not _ext.disabled() else [])
def test_activations_of_every_size_of_number(activation, isa):
    """As many rows of x, and as many weights. NaN is where torch has it, as for minus infinity."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(torch.bfloat16).float()[:, None]
    expected = PACKED_ACTIVATIONS[activation](every.double()).float()
    one = torch.ones(1, 1)
    options = {"packing": "f32", "activation": activation}
    with instruction_set(isa):
        for y in (
            packed_linear(every, pack(one, "f32"), out_features=1, **options),
            packed_linear(one, pack(every, "f32"), out_features=len(every), **options).mT,
        ):
            torch.testing.assert_close(y, expected, rtol=2e-6, atol=2e-7, equal_nan=True)
