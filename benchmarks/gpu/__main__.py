"""`make bench-gpu`, `python -m benchmarks.gpu`: models and operators on a GPU, within ten minutes.
Writes benchmarks/results/gpu-<card>.json.
"""

import argparse
import datetime
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.gpu.groups import Configs, groups
from benchmarks.gpu.operators import measure_operators
from benchmarks.models import report
from benchmarks.models.groups import Group
from benchmarks.models.measure import measure_group

OPERATORS = "operators"
LEAST_SECONDS = 5  # for a contender: it takes longer to start
# Most seconds for each, of ten minutes, in the order of what matters most.
SHARES = {"1b": 110, "8b": 150, "lora-1b": 60, OPERATORS: 110, "11b": 100, "lora-8b": 70}


def main(argv: list[str] | None = None) -> int:
    """Measure, print and save; return the process's exit code: 1 where anything is missing."""
    arguments = _parse(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        print(
            f"make bench-gpu: there is no GPU: torch {torch.__version__} finds no CUDA device. "
            "Nothing was measured. `--quick --device cpu` runs all of it on tiny models.",
            file=sys.stderr,
        )
        return 1
    torch.manual_seed(0)
    if arguments.quick:
        harness.RUNS, harness.RUN_SECONDS = 1, 1e-4
    card = torch.cuda.get_device_name() if arguments.device == "cuda" else harness.processor()
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "card": card,
        "machine": harness.machine(),
    }
    print(f"{card}; {facts['machine']}")
    path = report.path_for(card, "gpu")
    measured: dict[str, Any] = {}
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory() as folder:
        configs = Configs(Path(folder), arguments.quick)
        known = groups(arguments.quick)
        for name, share in SHARES.items():
            if name not in arguments.only or name not in (*known, OPERATORS):
                continue
            seconds = min(share * arguments.minutes / 10, end - time.monotonic())
            seconds = math.inf if arguments.quick else seconds
            if name == OPERATORS:
                found = measure_operators(arguments.device, seconds, arguments.quick)
            else:
                found = measure_contenders(known[name], configs, arguments, seconds)
                print("\n".join(table(found)), flush=True)
            measured[name] = found
            if not arguments.no_save:  # at once: a later group may fail
                report.save(path, facts, measured)
    missing = [f"{name}: {what}" for name, found in measured.items() for what in found["left_out"]]
    print("\n".join(["", *(f"not measured: {line}" for line in missing)]))
    return int(bool(missing))


def measure_contenders(
    contenders: tuple[Group, ...], configs: Configs, arguments: argparse.Namespace, seconds: float
) -> dict[str, Any]:
    """A group's results. Contenders have equal shares of the time that is left."""
    end, rows, roofs, left_out = time.monotonic() + seconds, [], {}, []
    rounds = 1 if arguments.quick else arguments.rounds
    for number, group in enumerate(contenders):
        left = (end - time.monotonic()) / (len(contenders) - number)
        (one,), measured = group.contenders, set()
        if left > LEAST_SECONDS:
            found = measure_group(
                group, configs, arguments.threads, rounds, arguments.device, limit=left
            )
            rows += found["rows"]
            roofs, measured = found["roofs"], {row["case"] for row in found["rows"]}
        left_out += [
            f"{one.engine.name} {one.precision}, {case.name}"
            for case in group.cases
            if case.name not in measured
        ]
    return {"model": contenders[0].model, "roofs": roofs, "rows": rows, "left_out": left_out}


def table(found: dict[str, Any]) -> Iterator[str]:
    """Lines for people: a group's rows, ours with their ratio to transformers'."""
    yield f"\n{found['model']}; {found['roofs']}"
    for row in found["rows"]:
        figures = []
        if "tokens_per_second" in row:
            figures.append(f"{row['tokens_per_second']:,.1f} tokens/s")
        if "share_of_read" in row:
            figures.append(f"{row['share_of_read']:.0%} of read speed")
        for name in ("first_token_seconds", "step_seconds"):
            if name in row:
                figures.append(f"{name.removesuffix('_seconds')} {1000 * row[name]:,.1f} ms")
        for name in ("gpu_peak_gb", "above_weights_gb"):
            if name in row:
                figures.append(f"{name.removesuffix('_gb')} {row[name]:.2f} GB")
        if row["engine"] == "mllama":
            figures += [f"{ratio:.2f} x transformers" for ratio in _ratios(row, found["rows"])]
        label = f"{row['engine']} {row['version']}, {row['precision']}"
        yield f"  {row['case']:26}  {label:50}  {', '.join(figures)}"


def _ratios(row: dict[str, Any], rows: list[dict[str, Any]]) -> Iterator[float]:
    """How much faster a row is than each of transformers' in its case."""
    for peer in rows:
        if peer["case"] == row["case"] and peer["engine"] != row["engine"]:
            if "tokens_per_second" in row:
                yield row["tokens_per_second"] / peer["tokens_per_second"]
            else:
                yield peer["first_token_seconds"] / row["first_token_seconds"]


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--minutes", type=float, default=10, help="for everything (default: 10)")
    parser.add_argument("--rounds", type=int, default=2, help="medians of how many (default: 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of every engine")
    parser.add_argument("--only", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--quick", action="store_true", help="a smoke run on tiny models")
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu" and not arguments.quick:
        parser.error("--device cpu takes --quick, too: the models are made for a GPU")
    if min(arguments.threads, arguments.rounds) < 1:
        parser.error("--threads and --rounds must be at least 1")
    if not 0 < arguments.minutes < math.inf:
        parser.error(f"--minutes must be above 0 and finite, got {arguments.minutes}")
    arguments.no_save |= arguments.quick
    return arguments


if __name__ == "__main__":
    sys.exit(main())
