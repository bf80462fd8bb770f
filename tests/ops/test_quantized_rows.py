"""quantize_rows and dequantize_rows against their references."""

import pytest
import torch

import devices
from helpers import instruction_set, instruction_sets, needs_kernels
from mllama.ops import dequantize_rows, quantize_rows
from mllama.ops.quantized_rows import reference_dequantize, reference_quantize, row_bytes

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("size", [0, 1, 8, 33, 64, 256])
@pytest.mark.parametrize("dtype", DTYPES)
def test_codes_are_the_references(size, dtype):
    generator = devices.generator(size)
    x = torch.randn(3, 5, size, generator=generator).mul(7).to(dtype).transpose(0, 1)
    expected = reference_quantize(x)
    assert expected.shape == (5, 3, row_bytes(size))
    for isa in instruction_sets():
        with instruction_set(isa):
            codes = quantize_rows(x)
            assert codes.shape == expected.shape and codes.dtype == torch.int8
            assert torch.equal(codes, expected)
            values = dequantize_rows(codes, size, dtype)
            assert torch.equal(values, reference_dequantize(codes, size, dtype))
            assert values.dtype == dtype and values.shape == x.shape


@pytest.mark.parametrize("quantize", [quantize_rows, reference_quantize])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_are_rounded_once(dtype, quantize):
    # The products end within a float's precision of one half: as floats many are at it.
    inverse = (1 / torch.linspace(0.011, 0.97, 200).bfloat16().float())[:, None]
    near = ((torch.arange(31) * 4 + 0.5) / inverse).to(dtype)
    x = torch.stack([near, near.nextafter(near * 2), near.nextafter(near * 0)]).float()
    x = torch.cat([x.to(dtype).float(), (127 / inverse).expand(3, -1, -1)], -1).to(dtype)
    scale = (x[..., -1:].float() / 127).bfloat16().float()
    exact = x.double() * (1 / scale).double()
    expected = torch.tensor([round(each) for each in exact.flatten().tolist()]).view(x.shape)
    twice = (x.float() * (1 / scale)).round()
    assert (twice != expected).any() or dtype != torch.float32
    for isa in instruction_sets():
        with instruction_set(isa):
            assert torch.equal(quantize(x)[..., :32].long(), expected.clamp(max=127))


def test_values_are_within_half_a_step():
    x = torch.randn(100, 96) * torch.logspace(-30, 30, 100)[:, None]
    values = dequantize_rows(quantize_rows(x), 96)
    step = x.abs().unflatten(-1, (3, 32)).amax(-1, keepdim=True) / 127
    error = (values - x).abs().unflatten(-1, (3, 32))
    assert (error <= step * 0.51).all()
    assert torch.equal(quantize_rows(x), quantize_rows(values))  # what is stored stays


def test_zeros_and_values_that_are_not_finite():
    x = torch.zeros(4, 40)
    x[1, 3], x[2, 35], x[3] = torch.inf, torch.nan, 1e-38
    for isa in instruction_sets():
        with instruction_set(isa):
            codes = quantize_rows(x)
            assert torch.equal(codes[:, :40], reference_quantize(x)[:, :40])  # NaN has many forms
            values = dequantize_rows(codes, 40)
            assert not values[0].any() and not values[3].any()
            assert values[1, :32].isnan().all() and not values[1, 32:].any()
            assert values[2, 32:].isnan().all() and not values[2, :32].any()


def test_parts_of_another_tensor():
    codes = quantize_rows(torch.randn(2, 3, 9, 16))
    part = codes[:, :, :4]
    assert torch.equal(dequantize_rows(part, 16), dequantize_rows(codes, 16)[:, :, :4])


@pytest.mark.parametrize("dequantize", [dequantize_rows, reference_dequantize])
def test_scales_may_begin_at_any_byte(dequantize):
    codes = quantize_rows(torch.randn(3, 33))
    part = torch.cat([codes.new_zeros(3, 1), codes], 1)[:, 1:]
    for moved in (part, torch.cat([codes[0, :1], codes.flatten()])[1:].view_as(codes)):
        assert torch.equal(dequantize(moved, 33), dequantize(codes, 33))


@needs_kernels
def test_registration():
    torch.library.opcheck(torch.ops.mllama.quantize_rows.default, (torch.randn(2, 40),))
    codes = quantize_rows(torch.randn(2, 40))
    dequantize = torch.ops.mllama.dequantize_rows.default
    torch.library.opcheck(dequantize, (codes, 40, torch.bfloat16))


@pytest.mark.parametrize("kernels", [True, False])
@pytest.mark.parametrize(
    ("call", "error"),
    [
        (lambda: quantize_rows(None), TypeError),
        (lambda: quantize_rows(torch.zeros(3, dtype=torch.float64)), TypeError),
        (lambda: quantize_rows(torch.tensor(1.0)), ValueError),
        (lambda: dequantize_rows(torch.zeros(34), 32), TypeError),
        (lambda: dequantize_rows(torch.zeros(34, dtype=torch.int8), 31), ValueError),
        (lambda: dequantize_rows(torch.zeros(34, dtype=torch.int8), -1), ValueError),
        (lambda: dequantize_rows(torch.zeros(34, dtype=torch.int8), 32, torch.int8), TypeError),
    ],
)
def test_refusals(call, error, kernels, monkeypatch):
    if not kernels:
        monkeypatch.setattr("mllama.ops._dispatch._EXTENSION", None)
    with pytest.raises(error, match="quantize_rows"):
        call()
