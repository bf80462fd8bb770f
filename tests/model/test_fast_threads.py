"""decode_step on any number of threads, in several at once, and after a fork."""

import copy
import multiprocessing
import os
import threading

import pytest
import torch

from helpers import needs_kernels
from mllama.ops import pack_weight, packed_linear
from mllama.quant.packer import optimize
from mllama.runtime.session import Session
from tiny import pairs

pytestmark = needs_kernels
PATIENCE = 120  # seconds until a process counts as hanging


@pytest.fixture
def threads():
    """Sets the number of threads; the former one comes back."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def packed(weights="int4"):
    return optimize(copy.deepcopy(pairs.pair("llama").ours), weights)


def decoded(session, **options):
    inputs, options = pairs.pair("llama").inputs(), {"max_new_tokens": 8} | options
    return [row.token_ids for row in session.generate(inputs, **options).completions]


def test_the_number_of_threads_may_change_between_steps(threads):
    expected, counts = decoded(Session(packed())), iter([1, 3, 2, 1, 4, 1, 2, 3])

    class Changing(Session):
        def _forward(self, *args, **given):
            threads(next(counts))
            return super()._forward(*args, **given)

    assert decoded(Changing(packed())) == expected


def test_more_threads_than_cores(threads):
    session = Session(packed())
    expected = decoded(session)
    threads(8 * (os.cpu_count() or 1))
    assert decoded(session) == expected


@pytest.mark.parametrize("own", [1, 2])
def test_several_threads_share_a_model(threads, own):
    model, results = packed(), {}
    expected = decoded(Session(model))

    def run(index):
        torch.set_num_threads(own)  # of this thread
        results[index] = [decoded(Session(model)) for _ in range(3)]

    workers = [threading.Thread(target=run, args=(index,)) for index in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(PATIENCE)
    assert not any(worker.is_alive() for worker in workers)
    assert results == {index: [expected] * 3 for index in range(6)}


def _decode_and_send(session, queue):
    x, weight = torch.randn(64, 1024), torch.randn(1024, 1024)
    packed_linear(x, pack_weight(weight, "int8"), out_features=1024, packing="int8")  # in parallel
    queue.put(decoded(session, temperature=1.0, seed=3))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_decodes(threads):
    """GNU OpenMP waits forever for threads that a fork did not take along."""
    threads(2)
    session = Session(packed())
    expected = decoded(session, temperature=1.0, seed=3)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    children = [
        context.Process(target=_decode_and_send, args=(session, queue), daemon=True)
        for _ in range(2)
    ]
    for child in children:
        child.start()
    try:
        assert [queue.get(timeout=PATIENCE) for _ in children] == [expected] * 2
    finally:
        for child in children:
            child.kill()
    assert decoded(session, temperature=1.0, seed=3) == expected


class Answers(torch.utils.data.Dataset):
    def __init__(self, session):
        self.session = session

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.tensor(decoded(self.session, temperature=1.0, seed=index)[0])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_workers_of_a_data_loader_decode(threads):
    threads(2)
    answers = Answers(Session(packed()))
    expected = [answers[index].tolist() for index in range(4)]
    loader = torch.utils.data.DataLoader(
        answers, batch_size=None, num_workers=2, multiprocessing_context="fork", timeout=PATIENCE
    )
    assert [answer.tolist() for answer in loader] == expected
