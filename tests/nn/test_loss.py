"""The loss of next-token prediction: values and gradients of the plain formula, without its copies
of the logits.
"""

import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.harness import saved_bytes
from helpers import assert_close
from mllama.nn.loss import counted_loss

WIDE = 1 << 19  # two rows of so many words are as much as is looked at together


def next_token_loss(*args, **options) -> torch.Tensor:
    return counted_loss(*args, **options)[0]


def sample(
    batch: int, length: int, vocabulary: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that ask for a gradient, and labels, one in the middle of each row and the first ones
    not trained.
    """
    torch.manual_seed(0)
    logits = (3 * torch.randn(batch, length, vocabulary)).to(dtype)
    labels = torch.randint(0, vocabulary, (batch, length))
    labels[:, [0, 1, length // 2]] = -100
    return logits.requires_grad_(), labels


def plain(
    logits: torch.Tensor, labels: torch.Tensor, dtype: torch.dtype = torch.float32
) -> torch.Tensor:
    return cross_entropy(logits[:, :-1].flatten(0, 1).to(dtype), labels[:, 1:].flatten())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", [(3, 7, 11), (1, 8, WIDE)], ids=["rows", "words"])
def test_values_and_gradients(size, dtype):
    logits, labels = sample(*size, dtype)
    loss = next_token_loss(logits, labels, labels.shape)
    expected = plain(logits, labels, torch.float64)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=0)
    (gradient,), (wanted,) = (torch.autograd.grad(3 * value, logits) for value in (loss, expected))
    assert gradient.dtype == dtype
    assert_close(
        gradient,
        wanted,
        {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}[dtype],
        "gradient",
    )


def test_only_the_logits_are_kept():
    logits, labels = sample(2, 40, 500, torch.bfloat16)
    given = logits.untyped_storage().nbytes()
    assert (
        given <= saved_bytes(lambda: next_token_loss(logits, labels, labels.shape)) <= 1.1 * given
    )
    assert saved_bytes(lambda: plain(logits, labels)) > 1.9 * given


def test_nothing_in_float32_is_as_large_as_the_logits():
    class Sizes(TorchDispatchMode):
        largest = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float32:
                self.largest = max(self.largest, result.numel())
            return result

    logits, labels = sample(1, 8, WIDE, torch.bfloat16)
    with Sizes() as sizes:
        next_token_loss(logits, labels, labels.shape).backward()
    assert sizes.largest == 2 * WIDE


def test_rows_that_are_not_trained_are_not_looked_at():
    logits, labels = sample(2, 6, 11, torch.float32)
    skipped = torch.cat((labels[:, 1:] == -100, torch.ones(2, 1, dtype=torch.bool)), 1)
    with torch.no_grad():
        logits[skipped] = float("nan")
    next_token_loss(logits, labels, labels.shape).backward()
    assert (
        not logits.grad[skipped].any()
        and logits.grad[~skipped].isfinite().all()
        and logits.grad[~skipped].any()
    )


@pytest.fixture
def untrained():
    """Logits, and labels of which none is trained: the first of a row has nothing before it."""
    logits, labels = sample(2, 6, 11, torch.float32)
    return logits, labels.fill_(-100).index_fill_(1, torch.tensor([0]), 3)


@pytest.mark.parametrize(
    "options", [{}, {"num_items_in_batch": 0}, {"num_items_in_batch": torch.tensor(0)}]
)
def test_a_loss_over_no_labels_is_an_error(untrained, options):
    logits, labels = untrained
    with pytest.raises(ValueError, match="labels"):
        next_token_loss(logits, labels, labels.shape, **options)


@pytest.mark.parametrize(
    ("count", "error"),
    [
        (0, ValueError),
        (-3, ValueError),
        (float("inf"), ValueError),
        (torch.tensor([2, 3]), ValueError),
        ("3", TypeError),
        (torch.tensor(True), TypeError),
    ],
)
def test_a_count_of_labels_that_cannot_be(count, error):
    logits, labels = torch.randn(1, 4, 9), torch.tensor([[1, 2, 3, 4]])
    with pytest.raises(error, match="num_items_in_batch"):
        next_token_loss(logits, labels, labels.shape, num_items_in_batch=count)
    tensor = torch.tensor([3], dtype=torch.float64)
    one = next_token_loss(logits, labels, labels.shape, num_items_in_batch=tensor)
    assert one.shape == () and one.dtype == torch.float32
    torch.testing.assert_close(one, next_token_loss(logits, labels, labels.shape))


def test_labels_of_other_batches_make_it_zero(untrained, monkeypatch):
    logits, labels = untrained

    def check(**options):
        logits.grad = None
        loss, found = counted_loss(logits, labels, labels.shape, **options)
        loss.backward()
        assert loss == 0 and found == 0 and not logits.grad.any()

    check(num_items_in_batch=5)
    with monkeypatch.context() as patch:  # several processes
        patch.setattr(torch.distributed, "is_initialized", lambda: True)
        patch.setattr(torch.distributed, "get_world_size", lambda: 2)
        check()
    state = pytest.importorskip("accelerate").state.GradientState
    with monkeypatch.context() as patch:
        patch.setattr(
            state, "_shared_state", {"plugin_kwargs": {"num_steps": 4}, "sync_gradients": True}
        )
        check()
    with pytest.raises(ValueError, match="labels"):
        check()
    with torch.no_grad():  # an evaluation's batch
        assert next_token_loss(logits, labels, labels.shape, num_items_in_batch=0).isnan()


def test_trained_labels_are_counted():
    logits, labels = sample(2, 6, 11, torch.float32)
    assert counted_loss(logits, labels, labels.shape)[1] == (labels[:, 1:] != -100).sum() == 6


def test_a_second_derivative_is_refused():
    logits, labels = sample(1, 4, 11, torch.float32)
    (gradient,) = torch.autograd.grad(
        next_token_loss(logits, labels, labels.shape), logits, create_graph=True
    )
    with pytest.raises(NotImplementedError, match="differentiated once"):
        gradient.sum().backward()


def test_function_transforms_and_compilers_get_the_same():
    logits, labels = sample(2, 6, 11, torch.float32)

    def loss(logits):
        return next_token_loss(logits, labels, labels.shape)

    (expected,) = torch.autograd.grad(loss(logits), logits)
    torch.testing.assert_close(torch.func.grad(loss)(logits.detach()), expected)
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")(logits)
    torch.testing.assert_close(compiled, loss(logits))
    torch.testing.assert_close(torch.autograd.grad(compiled, logits)[0], expected)


def test_autocast_leaves_it_in_float32():
    logits, labels = sample(2, 6, 300, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(logits, labels, labels.shape)
    assert torch.equal(loss, next_token_loss(logits, labels, labels.shape))


@pytest.mark.parametrize("labels", [[[0, 11]], [[0, -1]]])
def test_labels_outside_the_vocabulary(labels):
    with pytest.raises(ValueError, match="0 to 10"):
        next_token_loss(torch.zeros(1, 2, 11), torch.tensor(labels), (1, 2))
