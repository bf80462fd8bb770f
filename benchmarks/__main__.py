"""`python -m benchmarks [name ...] [--no-save]`: one table per operator or model, also written to
benchmarks/results/<name>.csv.

Every benchmarks/ops/bench_<name>.py and benchmarks/models/bench_<name>.py defines PEER, a line that
names the baseline, and cases(), which yields Cases, and strings as remarks: they are printed below
the table and written to the head of the file.
"""

import argparse
import importlib
import sys
from pathlib import Path

import torch

from benchmarks import harness

HERE = Path(__file__).parent


def main() -> None:
    known = {
        path.stem.removeprefix("bench_"): path.parent.name
        for path in sorted(HERE.glob("*/bench_*.py"))
    }
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description="Time operators against torch's eager equivalents, and models against "
        "transformers'.",
    )
    parser.add_argument(
        "names",
        nargs="*",
        metavar="name",
        help=f"benchmarks to run (default: all): {', '.join(sorted(known))}",
    )
    parser.add_argument(
        "--no-save", action="store_true", help="print only; do not write benchmarks/results"
    )
    arguments = parser.parse_args()
    unknown = sorted(set(arguments.names) - set(known))
    if unknown:
        parser.error(f"no benchmark of {', '.join(unknown)}; there are {', '.join(sorted(known))}")

    torch.manual_seed(0)
    notes = [harness.machine(), f"roofs: {harness.measure_roofs()}"]
    print("\n".join(notes))
    for name in arguments.names or sorted(known):
        bench = importlib.import_module(f"benchmarks.{known[name]}.bench_{name}")
        rows, remarks = [], []
        for case in bench.cases():
            if isinstance(case, str):
                remarks.append(case)
                continue
            rows.append(harness.table_row(harness.measure(case)))
            del case  # what it calls may have models, and the next ones are made now
            if sys.stderr.isatty():
                print(f"\r{name}: {len(rows)} cases", end="", file=sys.stderr)
        if sys.stderr.isatty():
            print("\r\033[K", end="", file=sys.stderr)
        harness.print_table(f"{name} against {bench.PEER}", rows)
        print("".join(f"{remark}\n" for remark in remarks), end="")
        if not arguments.no_save:
            harness.write_csv(
                HERE / "results" / f"{name}.csv", [*notes, f"peer: {bench.PEER}", *remarks], rows
            )


if __name__ == "__main__":
    main()
