"""Measures a group: all contenders are loaded, then take turns at every case, round by round."""

import math
import statistics
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

from benchmarks.harness import Reading, Roofs, measure_roofs
from benchmarks.models.files import Files
from benchmarks.models.groups import Case, Contender, Group
from benchmarks.models.worker import Worker, WorkerError

# Names of the machine's limits in files, and in `Roofs`.
ROOFS = {
    "read_gb_per_second": "read",
    "matmul_f32_gflops": "matmul_f32",
    "matmul_bf16_gflops": "matmul_bf16",
}


@dataclass
class Row:
    """All measurements of a contender in a case.

    Attributes:
        rates: tokens per second, by round.
        bytes_per_second: that were read, if known, by round.
        shares: of what the machine read just before and after, by round.
        peak: the most memory that the process had, in bytes.
        load_seconds: from the start of the process until the model was ready.
        rounds: how many it was measured in.
        more: other figures by name, by round.
    """

    case: str
    engine: str
    precision: str
    version: str
    rates: list[float] = field(default_factory=list)
    bytes_per_second: list[float] = field(default_factory=list)
    shares: list[float] = field(default_factory=list)
    peak: int = 0
    load_seconds: float = 0
    rounds: int = 0
    more: dict[str, list[float]] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """With medians."""
        found: dict[str, Any] = {
            "case": self.case,
            "engine": self.engine,
            "precision": self.precision,
            "version": self.version,
            "peak_gb": round(self.peak / 1e9, 2),
            "load_seconds": round(self.load_seconds, 2),
        }
        found |= {name: round(statistics.median(x), 3) for name, x in self.more.items()}
        if self.rates:
            found["tokens_per_second"] = round(statistics.median(self.rates), 3)
            found["rounds"] = [round(rate, 3) for rate in self.rates]
        if self.bytes_per_second:
            speed = statistics.median(self.bytes_per_second) / 1e9
            share = statistics.median(self.shares)
            found |= {"gb_per_second": round(speed, 2), "share_of_read": round(share, 3)}
        return found


def measure_group(
    group: Group,
    files: Files,
    threads: int,
    rounds: int,
    device: str = "cpu",
    limit: float = math.inf,
) -> dict[str, Any]:
    """Rows of a group, with the limits of the machine while it was measured (medians over rounds).

    A contender that is not installed is left out; one that fails is reported and left out of that
    case. With a limit, the most seconds for a contender, a case has as many rounds as fit.
    """
    least = rounds if math.isinf(limit) else 1
    how = _How(files, threads, rounds, device, limit)
    rows: list[Row] = []
    roofs: list[Roofs] = []
    for part in [(one,) for one in group.contenders] if group.alone else [group.contenders]:
        rows += _take_turns(replace(group, contenders=part), how, roofs)
    return {
        "model": group.model,
        "bits": group.bits,
        "roofs": {
            name: round(statistics.median(getattr(roof, field) for roof in roofs), 2)
            for name, field in ROOFS.items()
        },
        "rows": [row.as_json() for row in rows if row.rounds >= least],
    }


@dataclass(frozen=True)
class _How:
    """What `measure_group` takes beside the group."""

    files: Files
    threads: int
    rounds: int
    device: str
    limit: float


def _take_turns(group: Group, how: _How, roofs: list[Roofs]) -> list[Row]:
    """Rows of contenders that are loaded together; adds the machine's limits in each round."""
    start, reading, on_gpu = time.perf_counter(), Reading(how.device), how.device != "cpu"
    with ExitStack() as stack:
        workers: list[tuple[Contender, Worker]] = []
        for contender in group.contenders:
            if (worker := _start(contender, how)) is not None:
                stack.callback(worker.close)
                workers.append((contender, worker))
        rows = [(_row(*pair, case), pair[1], case) for case in group.cases for pair in workers]
        for turn in range(how.rounds + 1):
            if turn:
                roofs.append(measure_roofs(how.device))
            for row, worker, case in rows:
                if turn or on_gpu or case == group.cases[0]:  # to warm up
                    _measure(worker, case, row, reading if turn else None)
            seconds = time.perf_counter() - start
            print(f"{group.name}: round {turn} of {how.rounds}, {seconds:.0f} s", file=sys.stderr)
    return [row for row, _, _ in rows]


def _row(contender: Contender, worker: Worker, case: Case) -> Row:
    return Row(
        case.name,
        contender.engine.name,
        contender.precision,
        worker.facts["version"],
        load_seconds=worker.load_seconds,
    )


def _start(contender: Contender, how: _How) -> Worker | None:
    engine, label = contender.engine, f"{contender.engine.name} {contender.precision}"
    if (python := engine.python) is None or (model := contender.file(how.files)) is None:
        print(f"{label}: not here", file=sys.stderr)
        return None
    try:
        return Worker(
            engine.worker, python, model, contender.weights, how.threads, how.device, how.limit
        )
    except WorkerError as error:
        print(f"{label} does not load: {error}", file=sys.stderr)
        return None


def _measure(worker: Worker, case: Case, row: Row, reading: Reading | None) -> None:
    """Adds a measurement to the row; without `reading` it only warms up."""
    if case.action not in worker.facts["actions"] or not worker.alive:
        return
    before = reading.speed() if reading else 0
    try:
        found = worker.ask(case.action, **case.arguments)
    except WorkerError as error:
        print(f"{row.engine} {row.precision} fails in {case.name}: {error}", file=sys.stderr)
        return
    row.peak = max(row.peak, found["peak"])
    if reading is None:
        return
    row.rounds += 1
    for name, figure in found.get("more", {}).items():
        row.more.setdefault(name, []).append(figure)
    if "tokens" in found:
        row.rates.append(found["tokens"] / found["seconds"])
    if "bytes" in found:
        speed = found["bytes"] / found["seconds"]
        row.bytes_per_second.append(speed)
        row.shares.append(speed / 1e9 / ((before + reading.speed()) / 2))
