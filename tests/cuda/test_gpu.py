"""How kernels are launched: on any stream and device, and from CUDA graphs."""

import subprocess
import sys

import pytest
import torch

from kernel_calls import ALL_CALLS
from mllama import ops

CAPTURABLE = [name for name, call in ALL_CALLS.items() if call.capturable]
LONG = 100_000_000  # cycles of the device, some 50 ms


def assert_same(actual, expected):
    assert all(torch.equal(*pair) for pair in zip(actual, expected, strict=True))


def zeros_like(sample):
    """The sample with its tensors of zeros, in the same memory layout."""
    return sample.to("cuda").map(torch.zeros_like)


def fill(sample, values):
    """Copy float tensors of one sample into another's."""
    pairs = [*zip(sample.args, values.args, strict=True)]
    pairs += [(sample.kwargs[name], value) for name, value in values.kwargs.items()]
    for to, value in pairs:
        if isinstance(to, torch.Tensor) and to.is_floating_point():
            to.copy_(value)


@pytest.mark.parametrize("name", ALL_CALLS)
def test_kernels_run_on_the_current_stream(name):
    """Their inputs come late on it: who runs on another stream reads zeros."""
    call = ALL_CALLS[name]
    values = call.typed(torch.float16).to("cuda")
    expected, late = call.results(values), zeros_like(call.typed(torch.float16))
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        torch.cuda._sleep(LONG)
        fill(late, values)
        actual = call.results(late)
    torch.cuda.current_stream().wait_stream(stream)
    assert_same(actual, expected)


@pytest.mark.parametrize("name", CAPTURABLE)
def test_a_graph_replays_kernels_on_new_values(name):
    call = ALL_CALLS[name]
    values = call.typed(torch.float16).to("cuda")
    with torch.no_grad():
        expected, static = _forward(call, values), zeros_like(call.typed(torch.float16))
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):  # workspaces are allocated outside of the graph
            _forward(call, static)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = _forward(call, static)
        fill(static, values)
        graph.replay()
    assert_same(found, expected)


def _forward(call, sample):
    found = call.call(*sample.args, **sample.kwargs)
    return list(found) if isinstance(found, tuple) else [found]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("name", ALL_CALLS)
def test_kernels_run_where_their_tensors_are(name):
    call = ALL_CALLS[name]
    typed = call.typed(torch.float32)
    with torch.cuda.device(0):
        actual = call.results(typed.to("cuda:1"))
        assert all(result.device.index == 1 for result in actual)
        assert_same([x.cpu() for x in actual], [x.cpu() for x in call.results(typed.to("cuda:0"))])


def test_tensors_on_two_devices_are_refused():
    x, weight = torch.randn(3, 8, device="cuda"), torch.randn(8)
    for call in (
        lambda: ops.rms_norm(x, weight),
        lambda: ops.rms_norm(x.cpu(), weight.cuda()),
        lambda: ops.layer_norm(x, weight, weight.cuda()),
        lambda: ops.lora_linear(x, weight[None], weight[None].cuda(), torch.ones(1, 1).cuda()),
    ):
        with pytest.raises(ValueError, match="weight is on c"):
            call()
    with pytest.raises(ValueError, match="up is on cpu, gate on cuda:0"):
        ops.swiglu(x, x.cpu())
    with pytest.raises(ValueError, match="k is on cpu, q on cuda:0"):
        q = torch.randn(1, 2, 2, 16, device="cuda")
        ops.attention(q, q.cpu(), q)


ROWS_THAT_ARE_NOT_THERE = """
import torch
from mllama.ops import pack_weight, unpack_weight
packed = pack_weight(torch.randn(37, 64, device="cuda"), "int8")
unpack_weight(packed, 37, 64, "int8", rows=torch.tensor([3, 37], device="cuda"))
torch.cuda.synchronize()
"""


def test_rows_that_are_not_there_end_the_process():
    """The kernel stops; a device's errors come later, and end its context."""
    program = [sys.executable, "-c", ROWS_THAT_ARE_NOT_THERE]
    done = subprocess.run(program, capture_output=True, text=True)
    assert done.returncode and "CUDA" in done.stderr
