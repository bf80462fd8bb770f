"""The emulator names the mistakes that kernels of planted.cu have, and runs the right ones."""

import ctypes
import itertools
import re
from types import SimpleNamespace

import pytest
import torch

import devices
import emulated

SCHEDULES = list(itertools.product(emulated.ORDERS, emulated.ARRIVALS))
SM_75 = devices.is_compiled() and emulated.architecture() == 75
MISTAKES = {
    "missing_barrier": "race|uninitialized read",
    "warp_barrier_between_warps": "race|uninitialized read",
    "shuffle_as_barrier": "race",
    "overwritten_before_read": "race",
    "blocks_add_to_one": "race",
    "missing_fence": "race",
    "missing_fence_after": "race",
    "atomic_beside_plain": "race",
    "past_the_end": "out of bounds: write of 4 bytes at offset 256 of x",
    "before_the_beginning": "out of bounds: read of 4 bytes at offset -4 of in",
    "past_shared_memory": "out of bounds: write of 4 bytes at offset 2.. of s .240",
    "unwritten_shared_memory": "uninitialized read",
    "result_read_before_written": "uninitialized read",
    "result_not_written": "4 bytes of out were never written",
    "input_written": "write to an input",
    "misaligned_vector": "misaligned",
    "misaligned_row": "misaligned",
    "local_variable_of_another_thread": "out of bounds",
    "too_much_shared_memory": "too much shared memory for sm_75",
    "divergent_barrier": "divergent barrier",
    "shuffle_with_ended_lanes": "wrong mask",
    "source_outside_of_mask": "shuffle from lane",
    "masks_that_differ": "wrong mask",
    "mma_in_half_a_warp": "wrong mask",
    "read_before_wait": "asynchronous copy has not arrived",
    "wait_without_barrier": "race|uninitialized read|has not arrived",
    "copy_over_what_is_read": "race",
    "never_waited_for": "asynchronous copy that nobody waits for",
    "too_many_threads": "impossible size",
}


def run(name: str) -> SimpleNamespace:
    """The tensors after a kernel ran, and its error, or ""."""
    steps = torch.arange(64, dtype=torch.float32)
    t = SimpleNamespace(
        x=steps.clone(),
        values=steps.clone(),
        out=torch.zeros(64),
        counts=torch.zeros(2, dtype=torch.int32),
        halves=torch.randn(2, 16, 16).half(),
    )
    error = ctypes.create_string_buffer(2000)
    pointers = (ctypes.c_void_p * 5)(*(tensor.data_ptr() for tensor in vars(t).values()))
    emulated.library().mllama_run_planted(name.encode(), pointers, error, ctypes.c_size_t(2000))
    t.error = error.value.decode()
    return t


@pytest.mark.parametrize("name", MISTAKES)
def test_mistake_is_named(name):
    """In every order of threads and of copies."""
    if name in ("read_before_wait", "never_waited_for") and SM_75:
        pytest.skip("sm_75 has no asynchronous copies")
    for order, arrival in SCHEDULES:
        emulated.set_options(order, arrival, architecture=75)
        assert re.search(MISTAKES[name], run(name).error), (order, arrival)


@pytest.mark.parametrize(("order", "arrival"), SCHEDULES)
def test_right_kernels(order, arrival):
    emulated.set_options(order, arrival, seed=7)
    steps = torch.arange(64.0)

    def result(name):
        tensors = run(name)
        assert tensors.error == ""
        return tensors

    assert torch.equal(result("reversed").out, steps.flip(0))
    assert torch.equal(
        result("swapped_in_pairs").out, (4 * torch.arange(32.0) + 1).repeat_interleave(2)
    )
    assert torch.equal(result("copied_asynchronously").out, steps.where(steps < 60, 0))
    sums = (torch.arange(16.0) + torch.arange(4.0)[:, None]).flatten()
    assert torch.equal(result("added_by_the_last_block").x, sums + sums.flip(0))
    for product in ("multiplied_by_8", "multiplied_by_16"):
        if product == "multiplied_by_16" and SM_75:
            continue  # sm_75 multiplies 8 columns at a time
        tensors = result(product)
        a, b = tensors.halves.float()
        torch.testing.assert_close(tensors.out.view(8, 8), (a @ b.T)[:8, :8])


def test_mistakes_have_a_place():
    assert "planted.cu:" in run("missing_barrier").error
    assert "planted.cu:" in run("divergent_barrier").error


def test_counters():
    emulated.take_counters()
    run("reversed")
    counters = emulated.take_counters()
    assert (counters.launches, counters.blocks, counters.threads) == (1, 1, 64)
    assert (counters.collectives, counters.accesses) == (64, 4 * 64)
