"""`python -m benchmarks [operator ...] [--no-save]`: one table per operator, each also written to benchmarks/results/<operator>.csv.

Every operator's file benchmarks/ops/bench_<operator>.py has PEER, a line saying what ours is measured against, and cases(), which makes
its Cases.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks import harness

HERE = Path(__file__).parent


def main() -> None:
    known = sorted(path.stem.removeprefix("bench_") for path in (HERE / "ops").glob("bench_*.py"))
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Time the operators against torch's eager equivalents.")
    parser.add_argument("operators", nargs="*", metavar="operator", help=f"which to time (default: all): {', '.join(known)}")
    parser.add_argument("--no-save", action="store_true", help="print only; leave benchmarks/results as it is")
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.operators) - set(known))
    if unknown:
        parser.error(f"no benchmark of {', '.join(unknown)}; there are {', '.join(known)}")

    torch.manual_seed(0)
    notes = [harness.machine(), f"roofs: {harness.measure_roofs()}"]
    print("\n".join(notes))
    for name in arguments.operators or known:
        bench = importlib.import_module(f"benchmarks.ops.bench_{name}")
        rows = []
        for case in bench.cases():
            rows.append(harness.table_row(harness.measure(case)))
            if sys.stderr.isatty():
                print(f"\r{name}: {len(rows)} cases", end="", file=sys.stderr)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        harness.print_table(f"{name} against {bench.PEER}", rows)
        if not arguments.no_save:
            harness.write_csv(HERE / "results" / f"{name}.csv", [*notes, f"peer: {bench.PEER}"], rows)


if __name__ == "__main__":
    main()
