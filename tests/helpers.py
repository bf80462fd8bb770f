"""What tests share. `check_op` proves one operator: every operator's test file calls it with its
samples.
"""

import contextlib
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch

import devices
import emulated
from mllama import _ext
from mllama.model.fast_decoder import FastDecoder
from mllama.ops import _dispatch
from mllama.runtime.session import Session

# Largest error accepted, relative to the largest value of the exact result. 16-bit results carry
# one or two roundings.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
needs_kernels = pytest.mark.skipif(
    _ext.disabled(), reason="MLLAMA_DISABLE_OPS=1: there are no kernels to test"
)


@dataclass
class Sample:
    """One call: positional and keyword arguments of the public function, float tensors given in
    float32.
    """

    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(
        self,
        change: Callable[[torch.Tensor], torch.Tensor],
        *,
        keep: Sequence[int | str] = (),
        only: Sequence[int | str] | None = None,
    ) -> "Sample":
        """The same call with its float tensors changed; `keep` and `only` say at which places (int)
        and names (str).
        """

        def one(place: int | str, value: Any) -> Any:
            chosen = place not in keep and (only is None or place in only)
            return (
                change(value)
                if chosen and isinstance(value, torch.Tensor) and value.is_floating_point()
                else value
            )

        return Sample(
            tuple(one(i, v) for i, v in enumerate(self.args)),
            {k: one(k, v) for k, v in self.kwargs.items()},
        )

    def to(self, device: str) -> "Sample":
        """The same call with every tensor on another device."""

        def one(value: Any) -> Any:
            return value.to(device) if isinstance(value, torch.Tensor) else value

        return Sample(tuple(map(one, self.args)), {k: one(v) for k, v in self.kwargs.items()})

    def leaves(self) -> list[torch.Tensor]:
        """The tensors that require a gradient, in order."""
        return [
            v
            for v in (*self.args, *self.kwargs.values())
            if isinstance(v, torch.Tensor) and v.requires_grad
        ]


# What torch.ops makes of C++'s std::invalid_argument; mllama.ops makes it a ValueError in any case.
THROWN = RuntimeError if torch.__version__ >= (2, 15) else ValueError


@dataclass
class BadCall:
    """A call that must be refused: the exact exception and a piece of its text."""

    call: Callable[[], Any]
    error: type[Exception]
    match: str


def instruction_sets() -> list[str]:
    """Those this CPU has, weakest first. CUDA kernels do not depend on them: one stands for all."""
    module = _ext.load()
    if devices.runs_cuda_kernels():
        return [module.isa()]
    compiled = module.build_info()["instruction_sets"].split()
    return compiled[: compiled.index(module.best_isa()) + 1]


@contextlib.contextmanager
def instruction_set(name: str):
    """Run the kernels with one instruction set for a while."""
    module = _ext.load()
    before = module.isa()
    module.set_isa(name)
    try:
        yield
    finally:
        module.set_isa(before)


def strided(tensor: torch.Tensor) -> torch.Tensor:
    """The same values in memory where no stride is what a fresh tensor has: rows are padded,
    elements two apart.
    """
    if tensor.dim() == 0:
        return tensor
    room = tensor.new_full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"))
    view = room[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
    return view.copy_(tensor)


def sliced(tensor: torch.Tensor) -> torch.Tensor:
    """The same values within a larger tensor's memory: without gaps, but neither where it begins
    nor aligned.
    """
    room = tensor.new_full((tensor.numel() + 6,), float("nan"))
    return room[3:-3].view(tensor.shape).copy_(tensor)


def assert_close(actual: torch.Tensor, exact: torch.Tensor, tolerance: float, what: str) -> None:
    """Shapes equal, no NaN where there is none, and the largest error within `tolerance` of the
    largest exact value (of 0.1 at least).
    """
    assert actual.shape == exact.shape, (
        f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    )
    actual, exact = (tensor.detach().cpu().double() for tensor in (actual, exact))
    assert torch.equal(actual.isnan(), exact.isnan()), (
        f"{what}: NaN in other places than in the reference"
    )
    if exact.numel():
        error = (actual - exact).nan_to_num().abs().max().item()
        scale = exact.nan_to_num().abs().max().item()
        assert error <= tolerance * max(scale, 0.1), (
            f"{what}: error {error:.3g} against values up to {scale:.3g}"
        )


def _with_usual_default(function: Callable) -> Callable:
    """The function with the CPU as torch's default device, as in users' programs, wherever the
    tensors are.
    """

    @functools.wraps(function)
    def run(*arguments, **options):
        with torch.device("cpu"):
            return function(*arguments, **options)

    return run


@_with_usual_default
def check_op(
    public: Callable,
    reference: Callable,
    samples: Sequence[Sample],
    *,
    raw: Sequence[tuple[Any, tuple]] = (),
    bad_calls: Sequence[BadCall] = (),
    differentiable: Sequence[int | str] | None = None,
    keep_float32: Sequence[int | str] = (),
    dtypes: Sequence[torch.dtype] = (torch.float32, torch.bfloat16, torch.float16),
    tolerance: dict[torch.dtype, float] = TOLERANCE,
    gradient_tolerance: dict[torch.dtype, float] | None = None,
    second_derivative: bool = False,
    result_dtype: torch.dtype | None = None,
    thread_counts: Sequence[int] = (1, 2),
) -> None:
    """Prove an operator on `samples` against its reference evaluated on the same (rounded) values
    in float64 or float32.

    Args:
        public: the function of `mllama.ops`; called as samples say.
        reference: the same in plain torch.
        samples: give odd widths, empty inputs and every option among them, all float tensors in
            float32.
        raw: (overload, arguments) pairs of torch.ops.mllama for `torch.library.opcheck`.
        bad_calls: what must be refused, and how.
        differentiable: places (int) and names (str) of the arguments that have gradients; None =
            every float tensor, () = the operator has no gradient.
        keep_float32: places and names of arguments that stay float32 beside 16-bit ones.
        dtypes, tolerance, gradient_tolerance: what is accepted for each dtype (see `assert_close`).
        second_derivative: the operator has one, equal to the reference's; without, it must raise.
        result_dtype: of the results; None = that of the float tensors.
        thread_counts: which must give the same bits; () where torch's matrix product, whose bits
            depend on it, is a part.

    Checked, on the device of devices.py: values for each dtype, instruction set and memory layout;
    16-bit beside float32 where kept so; determinism, run to run and over thread counts; gradients
    against the reference's; that a second derivative raises or is right; opcheck;
    torch.compile(fullgraph=True, backend="aot_eager"), forward and gradients; every bad call, with
    kernels and without. With --device=ptx only values and gradients.
    """
    gradient_tolerance = gradient_tolerance or {
        dtype: 4 * bound for dtype, bound in tolerance.items()
    }
    has_gradient = differentiable != ()
    device = devices.tensor_device()
    samples = [sample.to(device) for sample in samples]
    for (number, sample), dtype in itertools.product(enumerate(samples), dtypes):
        typed = sample.map(lambda value, dtype=dtype: value.to(dtype), keep=keep_float32)
        what = f"sample {number}, {dtype}"
        wanted = result_dtype or dtype
        _check_values(public, reference, typed, device, tolerance[dtype], wanted, what)
        if has_gradient:
            bound = gradient_tolerance[dtype]
            _check_gradients(public, reference, typed, device, differentiable, bound, what)
    if devices.is_emulated():
        counters = emulated.take_counters()
        assert counters.launches and counters.accesses, "no CUDA kernel has run"
    if devices.is_compiled():
        return  # what follows is the host's, and the same as with kernels from their sources
    if has_gradient and second_derivative:
        _check_second_derivative(
            public,
            reference,
            _leaves(samples[0], differentiable),
            gradient_tolerance[torch.float32],
        )
    elif has_gradient:
        _check_no_second_derivative(public, _leaves(samples[0], differentiable))
    for sample in samples:
        _check_determinism(public, _leaves(sample, differentiable), has_gradient, thread_counts)
    for overload, arguments in raw:
        torch.library.opcheck(overload, Sample(arguments).to(device).args)
    for sample in samples[:2]:
        _check_compile(public, _leaves(sample, differentiable), has_gradient)
    with torch.device(device):  # what bad calls make
        for bad in bad_calls:
            _check_refused(bad)
            with pytest.MonkeyPatch.context() as patch:  # the reference's own check refuses it too
                patch.setattr(_dispatch, "_EXTENSION", None)
                _check_refused(bad)


def _check_refused(bad: BadCall) -> None:
    with pytest.raises(bad.error, match=bad.match) as caught:
        bad.call()
    assert type(caught.value) is bad.error, (
        f"{bad.match}: {type(caught.value).__name__}, expected {bad.error.__name__}"
    )


def _results(value) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _leaves(sample: Sample, differentiable: Sequence[int | str] | None) -> Sample:
    """The sample with fresh leaves of the same memory layout that require a gradient: all float
    tensors, or those named.
    """

    def leaf(value: torch.Tensor) -> torch.Tensor:
        return value.detach().requires_grad_()

    if differentiable is None:
        return sample.map(leaf)
    return sample.map(leaf, only=differentiable)


def _gradients(function: Callable, sample: Sample) -> list[torch.Tensor | None]:
    """Gradients of a fixed random projection of all results, for every tensor of the sample that
    asks for one.
    """
    results = _results(function(*sample.args, **sample.kwargs))
    options = {"generator": torch.Generator().manual_seed(1), "device": "cpu"}
    loss = sum(
        (r.cpu().double() * torch.randn(r.shape, dtype=torch.float64, **options)).sum()
        for r in results
    )
    return list(torch.autograd.grad(loss, sample.leaves(), allow_unused=True))


def _variants(sample: Sample, device: str) -> Iterator[tuple[str, Sample]]:
    """The sample on the device, under every instruction set, in memory of its own, in a part of
    another's, and with strides.
    """
    sample = sample.to(device)
    for isa in instruction_sets():
        with instruction_set(isa):
            yield f"{isa}, contiguous", sample
            yield f"{isa}, sliced", sample.map(sliced)
            if not devices.is_compiled():
                yield f"{isa}, strided", sample.map(strided)


def _check_values(public, reference, sample, device, tolerance, dtype, what) -> None:
    exact = sample.map(torch.Tensor.float)
    expected = _results(reference(*exact.args, **exact.kwargs))
    for variant, call in _variants(sample, device):
        for k, (actual, wanted) in enumerate(
            zip(_results(public(*call.args, **call.kwargs)), expected, strict=True)
        ):
            assert actual.dtype == dtype, f"{what}, {variant}: result {k} is {actual.dtype}"
            assert_close(actual, wanted, tolerance, f"{what}, {variant}, result {k}")


def _check_gradients(public, reference, sample, device, differentiable, tolerance, what) -> None:
    expected = _gradients(reference, _leaves(sample.map(torch.Tensor.float), differentiable))
    for variant, call in _variants(sample, device):
        for k, (actual, wanted) in enumerate(
            zip(_gradients(public, _leaves(call, differentiable)), expected, strict=True)
        ):
            where = f"{what}, {variant}, gradient {k}"
            if actual is None or wanted is None:
                assert actual is None and (wanted is None or not wanted.any()), where
            else:
                assert_close(actual, wanted, tolerance, where)


def _gradient_of_squares(function, sample) -> tuple[torch.Tensor, ...]:
    loss = sum(r.square().sum() for r in _results(function(*sample.args, **sample.kwargs)))
    return torch.autograd.grad(loss, sample.leaves(), create_graph=True)


def _check_no_second_derivative(public, sample) -> None:
    first = _gradient_of_squares(public, sample)
    with pytest.raises(NotImplementedError, match="differentiated once"):
        torch.autograd.grad(first[0].sum(), sample.leaves())


def _check_second_derivative(public, reference, sample, tolerance) -> None:
    def second(function):
        return torch.autograd.grad(
            sum(g.square().sum() for g in _gradient_of_squares(function, sample)), sample.leaves()
        )

    for k, pair in enumerate(zip(second(public), second(reference), strict=True)):
        assert_close(*pair, tolerance, f"second derivative {k}")


def _check_determinism(public, sample, has_gradient, thread_counts) -> None:
    """The same bits again, whatever the number of threads. CUDA kernels do not depend on it."""
    if devices.runs_cuda_kernels():
        thread_counts = ()
    threads = torch.get_num_threads()
    runs = []
    try:
        for count in (threads, threads, *thread_counts):
            torch.set_num_threads(count)
            runs.append(
                [
                    *_results(public(*sample.args, **sample.kwargs)),
                    *(_gradients(public, sample) if has_gradient else []),
                ]
            )
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(map(_same_bits, runs[0], run)), (
            "the bits change from run to run, or with the number of threads"
        )


def _check_compile(public, sample, has_gradient) -> None:
    torch._dynamo.reset()
    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    results = zip(
        _results(compiled(*sample.args, **sample.kwargs)),
        _results(public(*sample.args, **sample.kwargs)),
        strict=True,
    )
    assert all(_same_bits(*pair) for pair in results), "the compiled call gives other bits"
    if has_gradient:
        assert all(map(_same_bits, _gradients(compiled, sample), _gradients(public, sample))), (
            "the compiled gradient has other bits"
        )


def _same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return a is b or (
        a is not None and b is not None and torch.equal(a.nan_to_num(), b.nan_to_num())
    )


def answer(model, processor, inputs, **options):
    """The completion that transformers' generate makes of one encoded prompt, greedy."""
    from mllama.hf.answering import GenerateSession

    return GenerateSession(model, processor).generate(inputs, **options).completions[0]


@contextlib.contextmanager
def layer_by_layer(model):
    """A hook in the model's decoder, which forbids `decode_step`."""
    hook = model.language_model.norm.register_forward_hook(lambda *call: None)
    try:
        yield
    finally:
        hook.remove()


@contextlib.contextmanager
def counted_steps():
    """Counts calls of `decode_step`: yields a mock."""
    step = FastDecoder.__call__
    with mock.patch.object(FastDecoder, "__call__", autospec=True, side_effect=step) as calls:
        yield calls


@contextlib.contextmanager
def counted_images(model):
    """Counts the images that a session encodes, one a call: yields a mock."""
    with mock.patch.object(model, "encode_images", side_effect=model.encode_images) as calls:
        yield calls


@contextlib.contextmanager
def prefilled(model):
    """Yields a list that gets (rows, tokens) of each pass."""
    passes, compute = [], model.compute

    def counted(inputs):
        passes.append(inputs.shape)
        return compute(inputs)

    with mock.patch.object(model, "compute", counted):
        yield passes


def decoded(model, inputs, fast=True, kv_cache=None):
    """Greedy tokens and logits of a few steps, by `decode_step` or by the layers."""
    logits, compute, length = [], type(model).compute, 6

    def recorded(self, given):
        output = compute(self, given)
        logits.append(output.logits[:, -1].clone())
        return output

    way = contextlib.nullcontext() if fast else layer_by_layer(model)
    with mock.patch.object(type(model), "compute", recorded), way, counted_steps() as calls:
        result = Session(model, kv_cache=kv_cache).generate(inputs, max_new_tokens=length)
    assert calls.call_count == (length - 1 if fast else 0)
    return [row.token_ids for row in result.completions], torch.stack(logits[1:]).float()
