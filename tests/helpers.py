"""What tests share. `check_op` proves one operator: every operator's test file calls it with its samples."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from mllama import _ext

INSTRUCTION_SETS = ("scalar", "avx2", "avx512", "avx512_bf16")
# Largest error accepted, relative to the largest value of the exact result. 16-bit results carry one or two roundings.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}
needs_kernels = pytest.mark.skipif(_ext.disabled(), reason="MLLAMA_DISABLE_OPS=1: there are no kernels to test")


@dataclass
class Sample:
    """One call: positional and keyword arguments of the public function, float tensors given in float32."""

    args: tuple
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "Sample":
        """The same call with every floating-point tensor changed; `keep_float32` tensors and all else stay."""

        def one(value):
            return change(value) if isinstance(value, torch.Tensor) and value.is_floating_point() else value

        return Sample(tuple(map(one, self.args)), {name: one(value) for name, value in self.kwargs.items()})

    def tensors(self) -> list[torch.Tensor]:
        return [v for v in (*self.args, *self.kwargs.values()) if isinstance(v, torch.Tensor) and v.requires_grad]


@dataclass
class BadCall:
    """A call that must be refused: the exact exception and a piece of its text."""

    call: Callable[[], Any]
    error: type[Exception]
    match: str


def instruction_sets() -> list[str]:
    """Those this CPU has, weakest first."""
    best = _ext.load().best_isa()
    return list(INSTRUCTION_SETS[: INSTRUCTION_SETS.index(best) + 1])


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
    """The same values in memory where no stride is what a fresh tensor has: rows are padded, elements two apart."""
    if tensor.dim() == 0:
        return tensor
    room = torch.full((*tensor.shape[:-1], 2 * tensor.shape[-1] + 3), float("nan"), dtype=tensor.dtype)
    view = room[..., 1 : 1 + 2 * tensor.shape[-1] : 2]
    return view.copy_(tensor)


def assert_close(actual: torch.Tensor, exact: torch.Tensor, tolerance: float, what: str) -> None:
    """Shapes equal, no NaN where there is none, and the largest error within `tolerance` of the largest exact value (of 0.1 at least)."""
    assert actual.shape == exact.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(exact.shape)}"
    actual, exact = actual.detach().double(), exact.detach().double()
    assert torch.equal(actual.isnan(), exact.isnan()), f"{what}: NaN in other places than in the reference"
    if exact.numel():
        error = (actual - exact).nan_to_num().abs().max().item()
        scale = exact.nan_to_num().abs().max().item()
        assert error <= tolerance * max(scale, 0.1), f"{what}: error {error:.3g} against values up to {scale:.3g}"


def _results(value) -> tuple[torch.Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _gradients(function, sample: Sample) -> list[torch.Tensor]:
    """Gradients of a fixed random projection of all results, for every tensor of the sample that asks for one."""
    results = _results(function(*sample.args, **sample.kwargs))
    generator = torch.Generator().manual_seed(1)
    loss = sum((r.double() * torch.randn(r.shape, generator=generator, dtype=torch.float64)).sum() for r in results)
    return list(torch.autograd.grad(loss, sample.tensors(), allow_unused=True))


def _differentiable(sample: Sample, names: Sequence[int | str] | None) -> Sample:
    """The sample with fresh leaves that require a gradient: all float tensors, or those at the given places and names."""

    def one(place, value):
        if not (isinstance(value, torch.Tensor) and value.is_floating_point()) or (names is not None and place not in names):
            return value
        return value.detach().clone(memory_format=torch.preserve_format).requires_grad_()

    return Sample(tuple(one(i, v) for i, v in enumerate(sample.args)), {k: one(k, v) for k, v in sample.kwargs.items()})


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
) -> None:
    """Prove an operator on `samples` against its reference evaluated on the same (rounded) values in float64 or float32.

    Args:
        public: the function of `mllama.ops`; called as samples say.
        reference: the same in plain torch.
        samples: give odd widths, empty inputs and every option among them, all float tensors in float32.
        raw: (overload, arguments) pairs of torch.ops.mllama for `torch.library.opcheck`.
        bad_calls: what must be refused, and how.
        differentiable: places (int) and names (str) of the arguments that have gradients; None = every float tensor,
            () = the operator has no gradient.
        keep_float32: places and names of arguments that stay float32 beside 16-bit ones.
        dtypes, tolerance, gradient_tolerance: what is accepted for each dtype (see `assert_close`).

    Checked: values for each dtype, instruction set and memory layout; 16-bit beside float32 where kept so; determinism, run
    to run and over thread counts; gradients against the reference's; that a second derivative raises; opcheck;
    torch.compile(fullgraph=True, backend="aot_eager"), forward and gradients; every bad call.
    """
    gradient_tolerance = gradient_tolerance or {dtype: 4 * bound for dtype, bound in tolerance.items()}

    def cast(sample: Sample, dtype: torch.dtype) -> Sample:
        def one(place, value):
            keep = place in keep_float32 or not (isinstance(value, torch.Tensor) and value.is_floating_point())
            return value if keep else value.to(dtype)

        return Sample(tuple(one(i, v) for i, v in enumerate(sample.args)), {k: one(k, v) for k, v in sample.kwargs.items()})

    def exact(sample: Sample) -> Sample:
        return sample.map(lambda t: t.detach().float())

    for number, sample in enumerate(samples):
        for dtype in dtypes:
            typed = cast(sample, dtype)
            expected = _results(reference(*exact(typed).args, **exact(typed).kwargs))
            for isa in instruction_sets():
                with instruction_set(isa):
                    for layout, call in (("contiguous", typed), ("strided", typed.map(strided))):
                        for k, (actual, wanted) in enumerate(zip(_results(public(*call.args, **call.kwargs)), expected, strict=True)):
                            what = f"sample {number}, {dtype}, {isa}, {layout}, result {k}"
                            assert actual.dtype == dtype, f"{what}: dtype {actual.dtype}"
                            assert_close(actual, wanted, tolerance[dtype], what)

    if differentiable != ():
        for number, sample in enumerate(samples):
            for dtype in dtypes:
                typed = _differentiable(cast(sample, dtype), differentiable)
                wanted = _gradients(reference, _differentiable(exact(typed), differentiable))
                for isa in instruction_sets():
                    with instruction_set(isa):
                        for layout in ("contiguous", "strided"):
                            call = typed if layout == "contiguous" else _differentiable(typed.map(lambda t: strided(t.detach())), differentiable)
                            for k, (actual, target) in enumerate(zip(_gradients(public, call), wanted, strict=True)):
                                what = f"sample {number}, {dtype}, {isa}, {layout}, gradient {k}"
                                if actual is None or target is None:
                                    assert actual is None and (target is None or not target.any()), what
                                else:
                                    assert_close(actual, target, gradient_tolerance[dtype], what)
        typed = _differentiable(samples[0], differentiable)
        results = _results(public(*typed.args, **typed.kwargs))
        first = torch.autograd.grad(sum(r.square().sum() for r in results), typed.tensors(), create_graph=True)
        with pytest.raises(NotImplementedError, match="differentiated once"):
            torch.autograd.grad(first[0].sum(), typed.tensors())

    # The same bits again, whatever the number of threads.
    threads = torch.get_num_threads()
    try:
        for sample in samples:
            call = _differentiable(sample, differentiable)
            seen = []
            for count in (threads, 1, 2):
                torch.set_num_threads(count)
                results = _results(public(*call.args, **call.kwargs))
                seen.append([*results, *(_gradients(public, call) if differentiable != () else [])])
            for again in seen[1:]:
                for a, b in zip(seen[0], again, strict=True):
                    assert (a is None and b is None) or torch.equal(a.nan_to_num(), b.nan_to_num()), "the bits change with the threads"
    finally:
        torch.set_num_threads(threads)

    for overload, arguments in raw:
        torch.library.opcheck(overload, arguments)

    compiled = torch.compile(public, fullgraph=True, backend="aot_eager")
    for sample in samples[:2]:
        call = _differentiable(sample, differentiable)
        for actual, wanted in zip(_results(compiled(*call.args, **call.kwargs)), _results(public(*call.args, **call.kwargs)), strict=True):
            assert torch.equal(actual, wanted), "the compiled call gives other bits"
        if differentiable != ():
            for actual, wanted in zip(_gradients(compiled, call), _gradients(public, call), strict=True):
                assert (actual is None and wanted is None) or torch.equal(actual, wanted), "the compiled gradient has other bits"
    torch._dynamo.reset()

    for bad in bad_calls:
        with pytest.raises(bad.error, match=bad.match) as caught:
            bad.call()
        assert type(caught.value) is bad.error, f"{bad.match}: {type(caught.value).__name__}, expected {bad.error.__name__}"
