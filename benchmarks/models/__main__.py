"""`python -m benchmarks.models`: whole models against other engines on this machine. Writes
benchmarks/results/models-<processor>.json and .png, and README.md's table. benchmarks/README.md
says how to install the peers.
"""

import argparse
import datetime
import json
import os
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks import harness
from benchmarks.models import report
from benchmarks.models.cold_start import measure_cold_starts
from benchmarks.models.files import LLAMA_1B, TINY, TINY_TILED, VISION_11B, Files
from benchmarks.models.groups import GROUPS, QUICK
from benchmarks.models.images import PROMPT_GROUPS, SIGLIP_GROUPS
from benchmarks.models.measure import measure_group
from benchmarks.models.plot import draw
from benchmarks.models.vision_11b import QUICK_VISION, VISION_GROUPS

USUAL, LARGE = GROUPS + SIGLIP_GROUPS, PROMPT_GROUPS + VISION_GROUPS
WORK = Path(__file__).parents[2] / "build/bench-models"
COLD = "cold"


def main(argv: list[str] | None = None) -> None:
    arguments = _parse(argv)
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    facts = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": harness.machine(),
        "threads": arguments.threads,
    }
    if arguments.quick:
        with tempfile.TemporaryDirectory() as folder:
            files = Files(Path(folder), TINY, TINY_TILED)
            found = {
                group.name: measure_group(group, files, arguments.threads, 1)
                for group in (QUICK, *QUICK_VISION)
            }
        print(report.table(facts | {"groups": found}))
        return
    files = Files(arguments.work, LLAMA_1B, VISION_11B)
    groups = [group for group in (*USUAL, *LARGE) if group.name in arguments.only]
    if arguments.prepare:
        for contender in (one for group in groups for one in group.contenders):
            if contender.engine.python is not None:
                contender.file(files)
        return
    path = report.path_for(harness.processor())
    measured: dict[str, Any] = {}

    def keep(name: str, found: dict[str, Any]) -> None:
        measured[name] = {"date": facts["date"], "threads": arguments.threads} | found
        if not arguments.no_save:  # at once: a later group may fail
            report.save(path, facts, measured)

    for group in groups:
        keep(group.name, measure_group(group, files, arguments.threads, arguments.rounds))
    if COLD in arguments.only:
        keep(COLD, measure_cold_starts(arguments.threads, arguments.rounds))
    print(report.table(facts | {"groups": measured}))
    if not arguments.no_save:
        drawn = _draw(json.loads(path.read_text()), path.with_suffix(".png"))
        report.save(path, facts | drawn, measured)
        report.write_readme(report.newest())


def _draw(content: dict[str, Any], path: Path) -> dict[str, str]:
    """Draw a picture, and return what the results say about it."""
    try:
        draw(content, path)
    except ImportError:
        print("no picture: matplotlib is not installed")
    return {"picture": path.name} if path.exists() else {}


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models", description=__doc__)
    usual = [*(group.name for group in USUAL), COLD]
    known = [*usual, *(group.name for group in LARGE)]
    parser.add_argument(
        "--only",
        nargs="+",
        metavar="GROUP",
        default=usual,
        help=f"groups, or beginnings of their names: {', '.join(known)} (default: all but the "
        "largest models)",
    )
    parser.add_argument(
        "--threads", type=int, default=os.cpu_count(), help="of every engine (default: the CPUs)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="medians of how many (default: 3)")
    parser.add_argument(
        "--work", type=Path, default=WORK, help="folder of the model files (default: build/...)"
    )
    parser.add_argument("--prepare", action="store_true", help="write the model files only")
    parser.add_argument("--no-save", action="store_true", help="print only")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a tiny model")
    arguments = parser.parse_args(argv)
    if min(arguments.threads, arguments.rounds) < 1:
        parser.error("--threads and --rounds must be at least 1")
    begins = tuple(arguments.only)
    arguments.only = [name for name in known if name.startswith(begins)]
    for begin in begins:
        if not any(name.startswith(begin) for name in known):
            parser.error(f"--only takes {', '.join(known)}, got {begin}")
    return arguments


if __name__ == "__main__":
    main()
