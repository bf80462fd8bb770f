"""Benchmark harness: cases, interleaved timing, machine and roofs, tables, CSV files."""

import csv
import platform
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

RUNS = 5  # interleaved runs per case; the median is reported
RUN_SECONDS = 0.02  # minimum duration of a run, which repeats its call

DTYPES = (torch.float32, torch.bfloat16)


@dataclass
class Case:
    """One row of a table: our call and its peer on the same inputs.

    Attributes:
        bytes: memory traffic of a perfect implementation: every input read once, every output
            written once. 0 if not meaningful.
        flops: arithmetic of one call. 0 if not meaningful.
    """

    shape: str
    dtype: torch.dtype
    direction: str
    ours: Callable[[], object]
    peer: Callable[[], object]
    bytes: int = 0
    flops: int = 0


@dataclass
class Row:
    """Median times of a case, in seconds per call."""

    case: Case
    ours: float
    peer: float


def both_directions(
    shape: str,
    ours: Callable,
    peer: Callable,
    inputs: tuple[torch.Tensor, ...],
    *,
    differentiable: int,
    forward_bytes: int = 0,
    backward_bytes: int = 0,
    forward_flops: int = 0,
    backward_flops: int = 0,
    peer_inputs: tuple[torch.Tensor, ...] | None = None,
) -> list[Case]:
    """The forward and the forward+backward case of one shape.

    `ours(*inputs)` and `peer(*(peer_inputs or inputs))` return a tensor or a tuple of tensors. The
    first `differentiable` inputs require gradients; every output gets a random gradient.
    """
    dtype = inputs[0].dtype
    ours_forward, ours_both = _directions(ours, inputs, differentiable)
    peer_forward, peer_both = _directions(peer, peer_inputs or inputs, differentiable)
    return [
        Case(shape, dtype, "forward", ours_forward, peer_forward, forward_bytes, forward_flops),
        Case(
            shape,
            dtype,
            "forward+backward",
            ours_both,
            peer_both,
            forward_bytes + backward_bytes,
            forward_flops + backward_flops,
        ),
    ]


def _directions(
    function: Callable, inputs: tuple[torch.Tensor, ...], differentiable: int
) -> tuple[Callable, Callable]:
    """(forward in inference mode, forward with gradients) of one function."""
    leaves = tuple(
        tensor.detach().requires_grad_(i < differentiable) for i, tensor in enumerate(inputs)
    )
    outputs = function(*leaves)
    gradients = tuple(torch.randn_like(output) for output in _tuple(outputs))

    def forward():
        with torch.inference_mode():
            return function(*inputs)

    def both():
        return torch.autograd.grad(_tuple(function(*leaves)), leaves[:differentiable], gradients)

    return forward, both


def _tuple(outputs) -> tuple[torch.Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def measure(case: Case) -> Row:
    """Time both sides of a case alternately, so that other load affects both, and take medians."""
    repeats = [_repeats(case.ours), _repeats(case.peer)]
    times: list[list[float]] = [[], []]
    for _ in range(RUNS):
        for side, call in enumerate((case.ours, case.peer)):
            times[side].append(_run(call, repeats[side]))
    return Row(case, statistics.median(times[0]), statistics.median(times[1]))


def _repeats(call: Callable) -> int:
    """Number of calls that fill RUN_SECONDS. Warms up as a side effect."""
    call()
    count = 1
    while True:
        seconds = _run(call, count) * count
        if seconds >= RUN_SECONDS / 4:
            return max(1, round(count * RUN_SECONDS / seconds))
        count *= 4


def _run(call: Callable, count: int) -> float:
    _wait()
    start = time.perf_counter()
    for _ in range(count):
        call()
    _wait()
    return (time.perf_counter() - start) / count


def _wait() -> None:
    """Wait for the GPU, if one is used."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def saved_bytes(call: Callable[[], object], parameters: Iterable[torch.Tensor] = ()) -> int:
    """Bytes that autograd saves for the backward pass of a call, each storage once, without
    `parameters`.
    """
    saved: dict[int, torch.UntypedStorage] = {}  # references, so that no address is reused

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = call()  # noqa: F841  keeps the graph alive until storages are counted
    for parameter in parameters:
        saved.pop(parameter.untyped_storage().data_ptr(), None)
    return sum(storage.nbytes() for storage in saved.values())


@dataclass
class Roofs:
    """Limits of the machine, measured with torch in the same process: memory bandwidth in GB/s and
    matrix multiplication in GFLOP/s.
    """

    read: float
    copy: float
    matmul_f32: float
    matmul_bf16: float

    def __str__(self) -> str:
        memory = f"read {self.read:.1f} GB/s, copy {self.copy:.1f} GB/s"
        matmul = f"matmul f32 {self.matmul_f32:.0f} GFLOP/s, bf16 {self.matmul_bf16:.0f} GFLOP/s"
        return f"{memory}, {matmul}"


# Elements of a buffer larger than the caches, 256 MiB and 2 GiB, and sides of matrices.
_BUFFERS, _SIDES = {"cpu": 1 << 26, "cuda": 1 << 29}, {"cpu": 2048, "cuda": 8192}


def measure_roofs(device: str = "cpu") -> Roofs:
    """Best of RUNS, with buffers larger than the caches, and square matrices."""
    reading = Reading(device)
    side = _SIDES[device]
    a = torch.randn(side, side, device=device)
    b = a.bfloat16()
    return Roofs(
        read=reading.speed(),
        copy=reading.copying(),
        matmul_f32=2 * side**3 / _best(lambda: a @ a) / 1e9,
        matmul_bf16=2 * side**3 / _best(lambda: b @ b) / 1e9,
    )


class Reading:
    """How fast memory is read: the fastest of a sum, a maximum and a dot product, since none of
    them is so on every machine; on a GPU a copy too, whose writes are as fast as its reads.
    """

    def __init__(self, device: str = "cpu"):
        self._device = device
        self._source = torch.ones(_BUFFERS[device], device=device)
        self._other = torch.ones_like(self._source)

    def speed(self) -> float:
        """GB/s, best of RUNS."""
        source, other = self._source, self._other
        bytes_ = source.nbytes
        speeds = [
            bytes_ / _best(source.sum),
            bytes_ / _best(source.amax),
            2 * bytes_ / _best(lambda: torch.dot(source, other)),
        ]
        copying = [] if self._device == "cpu" else [self.copying()]
        return max(*(speed / 1e9 for speed in speeds), *copying)

    def copying(self) -> float:
        """GB/s of a copy, reads and writes, best of RUNS."""
        return 2 * self._source.nbytes / _best(lambda: self._other.copy_(self._source)) / 1e9


def _best(call: Callable) -> float:
    call()
    return min(_run(call, 1) for _ in range(RUNS))


def machine() -> str:
    """One line: processor, threads, instruction sets, versions."""
    from mllama import _ext

    extension = _ext.load()
    isa = extension.isa() if extension is not None else "references"
    torch_isa = torch.backends.cpu.get_cpu_capability().lower()
    return (
        f"{processor()}; {torch.get_num_threads()} threads; mllama on {isa}; "
        f"torch {torch.__version__} on {torch_isa}"
    )


def processor() -> str:
    """Name, family and model from /proc/cpuinfo, or the platform module's name without it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    fields = {
        key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)
    }
    if "cpu family" not in fields:
        return platform.machine()
    return f"{fields['model name']} family {fields['cpu family']} model {fields['model']}"


HEADER = ("shape", "dtype", "direction", "ours us", "peer us", "speed-up", "GB/s", "GFLOP/s")


def table_row(row: Row) -> tuple[str, ...]:
    """A row as strings, in the order of HEADER."""
    case = row.case
    return (
        case.shape,
        str(case.dtype).removeprefix("torch."),
        case.direction,
        f"{row.ours * 1e6:.1f}",
        f"{row.peer * 1e6:.1f}",
        f"{row.peer / row.ours:.2f}",
        f"{case.bytes / row.ours / 1e9:.1f}" if case.bytes else "",
        f"{case.flops / row.ours / 1e9:.1f}" if case.flops else "",
    )


def print_table(title: str, rows: Iterable[tuple[str, ...]]) -> None:
    """Print an aligned table: text to the left, numbers to the right."""
    lines = [HEADER, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    print(f"\n{title}")
    for line in lines:
        print(
            "  ".join(
                cell.ljust(width) if i < 3 else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(line, widths, strict=True))
            )
        )


def write_csv(path: Path, notes: Iterable[str], rows: Iterable[tuple[str, ...]]) -> None:
    """Write HEADER and rows, after the notes as lines that start with '#'."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        file.writelines(f"# {note}\n" for note in notes)
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(HEADER)
        writer.writerows(rows)
