"""cross_entropy_ and linear_cross_entropy against their references, and these against PyTorch's."""

import importlib
import math

import pytest
import torch

import devices
from helpers import (
    BadCall,
    Sample,
    assert_close,
    check_op,
    instruction_set,
    instruction_sets,
    needs_kernels,
)
from mllama.ops import linear_cross_entropy
from mllama.ops.cross_entropy import cross_entropy_
from mllama.ops.cross_entropy import reference as rows_reference
from mllama.ops.linear_cross_entropy import reference

MODULE = importlib.import_module("mllama.ops.linear_cross_entropy")
SIZES = [1, 5, 33, 512, 515, 3000, 4096]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def rows(size, count=7, dtype=torch.float32, scale=3.0):
    targets = torch.randint(0, size, (count,))
    targets[1], targets[2] = -1, size  # without loss
    return (scale * torch.randn(count, size)).to(dtype), targets


@needs_kernels
@pytest.mark.parametrize("softcap", [0.0, 4.0])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", SIZES)
def test_rows(size, dtype, softcap):
    scores, targets = rows(size, dtype=dtype)
    exact = scores.to(torch.float32, copy=True)  # becomes the gradient
    expected = rows_reference(exact, targets, softcap, 3.0)
    device = devices.tensor_device()
    for isa in instruction_sets():
        with instruction_set(isa):
            kept, own = scores.to(device, copy=True), scores.to(device, copy=True)
            losses = cross_entropy_(kept, targets.to(device), softcap)
            assert torch.equal(kept.cpu(), scores.cpu())  # no gradient was asked for
            assert_close(losses, expected, 2e-6, isa)
            assert torch.equal(losses, cross_entropy_(own, targets.to(device), softcap, 3.0))
            assert_close(own, exact, {4: 2e-6}.get(dtype.itemsize, 4e-3), isa)
            assert not own[1:3].any() and not losses[1:3].any()


@needs_kernels
def test_rows_that_are_no_distribution():
    """NaN, and +inf, which leaves none; -inf is a token that cannot come."""
    scores = torch.randn(4, 600)
    scores[0, 3], scores[1, 9], scores[2, 4], scores[3] = math.nan, math.inf, -math.inf, -math.inf
    targets = torch.tensor([3, 8, 7, 7])
    expected = torch.nn.functional.cross_entropy(scores, targets, reduction="none")
    losses = cross_entropy_(scores.clone(), targets, 0.0, 1.0)
    assert losses.isnan().tolist() == [True, True, False, True] == expected.isnan().tolist()
    torch.testing.assert_close(losses[2], expected[2])


@needs_kernels
def test_extreme_rows():
    """Scores of any size neither overflow nor lose the loss."""
    scores = torch.tensor([[1e30, 0.0, -1e30], [-200.0, 200.0, 0.0], [88.0, 89.0, 90.0]])
    targets = torch.tensor([0, 0, 2])
    losses = cross_entropy_(scores, targets)
    expected = torch.nn.functional.cross_entropy(scores.double(), targets, reduction="none")
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=1e-7)


@needs_kernels
def test_the_highest_score_is_found_wherever_it_is():
    """e^1000 of a highest one that was missed would be infinite."""
    places = torch.arange(0, 3000, 62)
    scores = torch.zeros(len(places), 3000)
    scores[torch.arange(len(places)), places] = 1000.0
    scores, places = (x.to(devices.tensor_device()) for x in (scores, places))
    assert not cross_entropy_(scores, places).any()
    assert (cross_entropy_(scores, 2999 - places) == 1000).all()


torch.manual_seed(0)
H, W = torch.randn(2, 5, 24), torch.randn(70, 24) / 3
L = torch.randint(0, 70, (2, 5))
ALL_LABELED = L.clone()
L[0, 1] = -100


def sample(shape, vocabulary, width=24, **options):
    labels = torch.randint(0, vocabulary, shape)
    labels.flatten()[::3] = options.get("ignore_index", -100)
    return Sample((torch.randn(*shape, width), torch.randn(vocabulary, width) / 3, labels), options)


SAMPLES = [
    # Compiled calls compute every row, so that bits are equal where each has a label.
    Sample((H, W, ALL_LABELED)),
    Sample((H, W, ALL_LABELED), {"softcap": 2.0, "reduction": "none"}),
    Sample((H, W, L)),
    Sample((H, W, L), {"softcap": 2.0, "reduction": "none"}),
    sample((9,), 3000, num_items_in_batch=20),
    sample((3, 4), 515, softcap=5.0, num_items_in_batch=torch.tensor(7)),
    sample((6,), 33, 7, reduction="sum", ignore_index=3),
    sample((2, 2), 64, reduction="none", ignore_index=-1),
    sample((0, 3), 64, reduction="sum"),
]


def call(*arguments, **options):
    return lambda: linear_cross_entropy(*arguments, **options)


BAD_CALLS = [
    BadCall(call(H.tolist(), W, L), TypeError, "hidden must be a torch.Tensor, got list"),
    BadCall(call(H, W.double(), L), TypeError, "weight must be float32, .* got float64"),
    BadCall(call(H, W, L.int()), TypeError, "labels must be int64, got int32"),
    BadCall(call(H, W[:, 1:], L), ValueError, r"weight must be \[vocabulary, 24\]"),
    BadCall(call(H, W[:0], L), ValueError, r"weight must be \[vocabulary, 24\]"),
    BadCall(call(H, W, L[:1]), ValueError, r"labels must be \[2, 5\] .* got \[1, 5\]"),
    BadCall(call(H, W, L + 68), ValueError, r"within the vocabulary \(0 to 69\)"),
    BadCall(
        call(H, W, torch.tensor([[-100, 3, -1, 69, -100]] * 2)),
        ValueError,
        r"must be -100 or within the vocabulary \(0 to 69\), got -1",
    ),
    BadCall(call(H, W, L, 0.0), ValueError, "softcap must be positive and finite, got 0.0"),
    BadCall(call(H, W, L, "2"), TypeError, "softcap must be a number or None, got str"),
    BadCall(call(H, W, L, None, "avg"), ValueError, "reduction must be one of mean, sum, none"),
    BadCall(call(H, W, L, ignore_index=None), TypeError, "ignore_index must be an int"),
    BadCall(
        call(H, W, L, reduction="sum", num_items_in_batch=3), ValueError, "is for the mean, got"
    ),
    BadCall(call(H, W, L, num_items_in_batch=0), ValueError, "must be above 0 and finite, got 0"),
    BadCall(call(H, W, L, num_items_in_batch="9"), TypeError, "must be a number or a tensor"),
    BadCall(call(H, W, L, num_items_in_batch=L), ValueError, r"one number, got \[2, 5\]"),
    BadCall(call(H, W, L, num_items_in_batch=torch.tensor(True)), TypeError, "number, got bool"),
    BadCall(call(H, W, L, num_items_in_batch=math.inf), ValueError, "finite, got inf"),
    BadCall(call(H, W, L, 1e-50), ValueError, "softcap must be positive and finite, got 1e-50"),
    BadCall(call(H, W, L, ignore_index=2**63), ValueError, "ignore_index must be an int64"),
]


@needs_kernels
@pytest.mark.parametrize("differentiable", [(0,), (0, 1), (1,)], ids=str)
def test_linear_cross_entropy(differentiable, monkeypatch):
    monkeypatch.setattr(MODULE, "_CHUNK", 3 * 4 * 70)  # several chunks, the last one smaller
    check_op(
        linear_cross_entropy,
        reference,
        SAMPLES,
        differentiable=differentiable,
        bad_calls=BAD_CALLS,
        thread_counts=(),
        result_dtype=torch.float32,
    )


def test_more_words_than_are_multiplied_at_a_time():
    made = sample((40,), 2500, num_items_in_batch=20)
    (hidden, weight, labels), options = made.args, made.kwargs
    found, exact = [], []
    for function, tensors, results in (
        (linear_cross_entropy, (hidden, weight), found),
        (reference, (hidden.double(), weight.double()), exact),
    ):
        tensors = [tensor.requires_grad_() for tensor in tensors]
        loss = function(*tensors, labels, **options)
        results += [loss.detach(), *torch.autograd.grad(loss, tensors)]
    torch.testing.assert_close(found, exact, check_dtype=False, rtol=1e-5, atol=1e-6)


@needs_kernels
def test_operator():
    scores, targets = rows(40)
    for gradient in (0.0, 1.0):
        call = (scores.to(devices.tensor_device()), targets.to(devices.tensor_device()), 2.0)
        torch.library.opcheck(
            torch.ops.mllama._cross_entropy.default,
            (*call, gradient),
            test_utils=("test_schema", "test_faketensor"),
        )


def test_compiled_with_rows_without_labels():
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for options in ({}, {"reduction": "none"}, {"reduction": "sum", "ignore_index": 5}):
        ours, theirs = (x.clone().requires_grad_() for x in (H, H))
        labels = L.where(L >= 0, options.get("ignore_index", -100))
        result, expected = (
            compiled(ours, W, labels, **options),
            reference(theirs, W, labels, **options),
        )
        torch.testing.assert_close(result, expected)
        result.sum().backward()
        expected.sum().backward()
        torch.testing.assert_close(ours.grad, theirs.grad)


def test_compiled_for_any_number_of_rows(monkeypatch):
    """One graph, whatever the number of chunks."""
    monkeypatch.setattr(MODULE, "_CHUNK", 3 * 4 * 70)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    for trained in (False, True):
        ours, theirs = (W.clone().requires_grad_(trained) for _ in range(2))
        hidden, labels = torch.randn(2, 9, 24), torch.randint(0, 70, (2, 9))
        for length in (9, 3, 6, 2):
            short = hidden[:, :length].clone().requires_grad_()
            torch._dynamo.mark_dynamic(short, 1)
            torch._dynamo.mark_dynamic(part := labels[:, :length].clone(), 1)
            result, copy = compiled(short, ours, part), short.detach().clone().requires_grad_()
            expected = linear_cross_entropy(copy, theirs, part)
            assert torch.equal(result, expected)
            result.backward()
            expected.backward()
            assert torch.equal(short.grad, copy.grad)
            assert not trained or torch.equal(ours.grad, theirs.grad)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 2


def test_compiled_with_a_label_that_is_none():
    """It is not left out of the mean in silence."""
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, backend="aot_eager")
    labels = ALL_LABELED.clone()
    labels[1, 2] = 70
    assert compiled(H, W, labels).isnan()
    losses = compiled(H, W, labels, reduction="none")
    assert losses.isnan().tolist() == (labels == 70).tolist()


def test_the_reference_is_pytorchs():
    logits = H @ W.T
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), L.flatten())
    torch.testing.assert_close(reference(H, W, L), expected)


@pytest.mark.parametrize("trained", [False, True])
def test_small_probabilities_keep_their_gradient_in_float16(trained):
    """A probability of 1e-7 is nothing in float16, and half of a million of them is a lot."""
    vocabulary = 20_000
    weight = torch.full((vocabulary, 8), -2.0)
    weight[0] = 0.0
    hidden = torch.ones(1, 8).half().requires_grad_()
    head = weight.half().requires_grad_(trained)
    linear_cross_entropy(hidden, head, torch.tensor([0])).backward()
    exact = torch.ones(1, 8).double().requires_grad_()
    reference(exact, weight.double(), torch.tensor([0])).backward()
    torch.testing.assert_close(hidden.grad.double(), exact.grad, rtol=5e-3, atol=0)


def test_no_labels():
    labels = torch.full((2, 5), -100)
    assert linear_cross_entropy(H, W, labels).isnan()
    hidden = H.clone().requires_grad_()
    loss = linear_cross_entropy(hidden, W, labels, num_items_in_batch=3)
    loss.backward()
    assert loss == 0 and not hidden.grad.any()


@pytest.mark.parametrize("differentiable", [(0,), (1,), (0, 1)], ids=str)
def test_second_derivatives_raise(differentiable):
    """Also in a sum with the loss, where a missing one would be taken for zero."""
    inputs = [x.clone().requires_grad_(i in differentiable) for i, x in enumerate((H, W))]
    loss = linear_cross_entropy(*inputs, L)
    wanted = [inputs[i] for i in differentiable]
    gradients = torch.autograd.grad(loss, wanted, create_graph=True)
    total = loss + sum((gradient**2).sum() for gradient in gradients)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(total, wanted, retain_graph=True)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        total.backward()


def test_a_count_in_a_tensor():
    expected = linear_cross_entropy(H, W, L, num_items_in_batch=7)
    for count in (torch.tensor([7]), torch.tensor([[7.0]], dtype=torch.float64)):
        loss = linear_cross_entropy(H, W, L, num_items_in_batch=count)
        assert torch.equal(loss, expected) and loss.dtype == torch.float32


def test_states_without_a_feature():
    """Logits of 0: each of 5 labels is as likely."""
    loss = linear_cross_entropy(torch.zeros(3, 0), torch.zeros(5, 0), torch.tensor([0, 4, 2]))
    torch.testing.assert_close(loss, torch.tensor(math.log(5)))


def test_the_meta_device():
    loss = linear_cross_entropy(H.to("meta"), W.to("meta"), L.to("meta"), reduction="none")
    assert loss.is_meta and loss.shape == (2, 5) and loss.dtype == torch.float32


def test_autocast():
    hidden = H.clone().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        loss = linear_cross_entropy(hidden, W, L)
        expected = reference(H.bfloat16(), W.bfloat16(), L)
    loss.backward()
    assert loss.dtype == hidden.grad.dtype == torch.float32
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


@needs_kernels
@pytest.mark.parametrize(("dtype", "trained"), [(torch.float32, False), (torch.bfloat16, True)])
def test_memory(dtype, trained):
    """No logits [T, vocabulary] are made, nor copies of those of a chunk."""
    hidden = torch.randn(1024, 8, dtype=dtype, requires_grad=True)
    weight = torch.randn(40_000, 8, dtype=dtype, requires_grad=trained)
    labels = torch.randint(0, 40_000, (1024,))
    with torch.profiler.profile(profile_memory=True) as profile:
        linear_cross_entropy(hidden, weight, labels).backward()
    peak = current = 0
    for event in sorted(profile.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        current += event.nbytes() if event.name() == "[memory]" else 0
        peak = max(peak, current)
    assert 0 < peak < 1.2 * MODULE._CHUNK < 1024 * 40_000 * 4
