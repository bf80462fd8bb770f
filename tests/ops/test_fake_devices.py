"""Operators on CUDA devices that are not there: results are on their device, tensors of two devices
are refused by name. With and without kernels for them.
"""

from collections.abc import Callable

import pytest
import torch

from fake_devices import DEVICES, fake_cuda
from helpers import needs_kernels
from mllama import ops
from mllama.ops.packed_layout import packed_bytes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="its devices are there")
KERNELS = [False, pytest.param(True, marks=needs_kernels)]


def zeros(device: str, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


def packed(device: str) -> torch.Tensor:
    return zeros(device, packed_bytes(4, 32, "int4"), dtype=torch.uint8)


# name of an argument: a call with that one on device b, all others on a
CALLS: dict[tuple[str, str], Callable] = {
    ("rms_norm", "weight"): lambda a, b: ops.rms_norm(zeros(a, 3, 8), zeros(b, 8)),
    ("add_rms_norm", "residual"): lambda a, b: ops.add_rms_norm(
        zeros(a, 3, 8), zeros(b, 3, 8), zeros(a, 8)
    ),
    ("layer_norm", "bias"): lambda a, b: ops.layer_norm(zeros(a, 3, 8), zeros(a, 8), zeros(b, 8)),
    ("rope", "cos"): lambda a, b: ops.rope(
        zeros(a, 1, 3, 2, 16), zeros(a, 1, 3, 2, 16), zeros(b, 1, 3, 8), zeros(a, 1, 3, 8)
    ),
    ("attention", "v"): lambda a, b: ops.attention(
        zeros(a, 1, 3, 2, 16), zeros(a, 1, 3, 2, 16), zeros(b, 1, 3, 2, 16)
    ),
    ("attention", "query_offset"): lambda a, b: ops.attention(
        *(zeros(a, 1, 3, 2, 16) for _ in range(3)),
        causal=True,
        query_offset=zeros(b, 1, dtype=torch.int64),
    ),
    ("swiglu", "up"): lambda a, b: ops.swiglu(zeros(a, 3, 8), zeros(b, 3, 8)),
    ("geglu", "up"): lambda a, b: ops.geglu(zeros(a, 3, 8), zeros(b, 3, 8)),
    ("patch_embed", "weight"): lambda a, b: ops.patch_embed(
        zeros(a, 1, 3, 4, 4), zeros(b, 5, 3, 2, 2)
    ),
    ("lora_linear", "lora_a"): lambda a, b: ops.lora_linear(
        zeros(a, 3, 8), zeros(a, 5, 8), zeros(b, 2, 8), zeros(a, 5, 2)
    ),
    ("packed_linear", "weight"): lambda a, b: ops.packed_linear(
        zeros(a, 3, 32), packed(b), out_features=4, packing="int4"
    ),
    ("select_token", "uniform"): lambda a, b: ops.select_token(
        zeros(a, 3, 8), None if a == b else zeros(b, 3, dtype=torch.float64)
    ),
    ("select_token", "present"): lambda a, b: ops.select_token(
        zeros(a, 3, 8), None, zeros(b, 3, 8, dtype=torch.bool), repetition_penalty=2.0
    ),
    ("unpack_weight", "rows"): lambda a, b: ops.unpack_weight(
        packed(a), 4, 32, "int4", rows=None if a == b else zeros(b, 2, dtype=torch.int64)
    ),
}


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("call", CALLS.values(), ids=map(" ".join, CALLS))
def test_results_are_on_their_device(call, device, kernels):
    with fake_cuda(kernels):
        results = call(device, device)
        for result in results if isinstance(results, tuple) else (results,):
            assert result.device == torch.device(device)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("other", ["cuda:1", "cpu"])
@pytest.mark.parametrize("name", CALLS, ids=" ".join)
def test_two_devices_are_refused_by_name(name, other, kernels):
    with fake_cuda(kernels), pytest.raises(ValueError, match=f"{name[1]} is on {other}"):
        CALLS[name]("cuda:0", other)
