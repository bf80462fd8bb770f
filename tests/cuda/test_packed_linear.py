"""Variants of packed_linear's CUDA kernels that the device or the number of rows selects."""

import itertools

import pytest
import torch

import devices
import emulated
from mllama.ops import packed_linear, unpack_weight
from mllama.ops.packed_layout import PACKINGS, pack
from mllama.ops.packed_linear import reference

OUT, IN = 40, 328  # blocks, tiles and chunks that are not whole


@pytest.fixture(autouse=True)
def usual_options():
    yield
    emulated.set_options()


@pytest.mark.parametrize("architecture", [75, 80])
@pytest.mark.parametrize("packing", PACKINGS)
def test_few_and_many_rows(packing, architecture):
    """In every order of threads; mma is for many rows from sm_80 on."""
    own = emulated.architecture()
    if devices.is_compiled() and (architecture < 80) != (own < 80):
        pytest.skip(f"the kernels were compiled for sm_{own}")
    weight, bias = torch.randn(OUT, IN) * IN**-0.5, torch.randn(OUT)
    packed = pack(weight, packing)
    options = {"out_features": OUT, "packing": packing}
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16}.get(packing, torch.float32)
    tolerance = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 2e-2}[dtype]
    for rows, order in itertools.product((1, 3, 70), emulated.ORDERS[:2]):
        arrival = "early" if order == "reverse" else "late"
        emulated.set_options(order, arrival, architecture=architecture)
        x = torch.randn(rows, IN).to(dtype)
        y = packed_linear(x, packed, bias, **options)
        expected = reference(x, packed, bias, **options)
        torch.testing.assert_close(y, expected, rtol=tolerance, atol=tolerance)


def test_rows_do_not_depend_on_others():
    """A row has the same bits alone and in a batch that the same kernel takes."""
    packed, x = pack(torch.randn(OUT, IN), "int4"), torch.randn(3, IN)
    options = {"out_features": OUT, "packing": "int4"}
    batch = packed_linear(x, packed, **options)
    assert all(torch.equal(packed_linear(x[i], packed, **options), batch[i]) for i in range(3))


def test_a_kernel_stops_at_rows_that_are_not_there():
    packed = pack(torch.randn(OUT, IN), "int8")
    for index in (-1, OUT):
        with pytest.raises(IndexError, match="rows"):
            unpack_weight(packed, OUT, IN, "int8", rows=torch.tensor([3, index]))
