"""Paper rooflines of the CUDA kernels, the table of docs/gpu-status.md: how long a card needs at
least for a kernel's bytes and operations, and how many of its warps there is room for. Nothing is
run; registers and shared memory are what ptxas says.

python scripts/rooflines.py    # needs nvcc; compiles every kernel for three architectures
"""

import argparse
import functools
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from occupancy import occupancy
from roofline_works import Work, works

CSRC = Path(__file__).parent.parent / "csrc"
PORT = 64  # bytes that a multiprocessor takes from the L2 cache in a clock
USAGE = re.compile(
    r"entry function '(\w+)'.*?Used (\d+) registers(?:[^\n]*?, (\d+) bytes smem)?", re.S
)


@dataclass(frozen=True)
class Card:
    """Published figures. `rates` are operations of a multiprocessor in a clock."""

    name: str
    architecture: int
    multiprocessors: int
    gigahertz: float  # boost
    gigabytes: float  # of memory, a second
    rates: dict[str, int]


# f16: with float32 sums. H100's peaks are those of wgmma, which no kernel here uses.
CARDS = [
    Card("T4", 75, 40, 1.59, 320, {"fma": 128, "dp4a": 512, "f16": 1024}),
    Card("RTX 3060", 86, 28, 1.777, 360, {"fma": 256, "dp4a": 512, "f16": 512, "int8": 2048}),
    Card("H100 SXM", 90, 132, 1.83, 3350, {"fma": 256, "dp4a": 512, "f16": 4096, "int8": 8192}),
]


@functools.cache
def usage(source: str, architecture: int) -> dict[str, tuple[int, int]]:
    """A file's kernels, by demangled name: registers of a thread, static bytes of shared memory."""
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", "-std=c++20", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas=-v"]
        command += ["-I", str(CSRC), str(CSRC / f"kernels/cuda/{source}.cu"), "-o", f"{folder}/out"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = USAGE.findall(done.stderr)
    filtered = subprocess.run(
        ["c++filt"],
        input="\n".join(f[0] for f in found),
        capture_output=True,
        text=True,
        check=True,
    )
    names = filtered.stdout.splitlines()
    return {
        name: (int(registers), int(shared or 0))
        for name, (_, registers, shared) in zip(names, found, strict=True)
    }


def needs(work: Work, architecture: int) -> tuple[int, int]:
    """Registers of a thread and bytes of shared memory of a block.

    Raises:
        ValueError: the source has no such kernel, or several.
    """
    start = f"void mllama::cuda::{work.kernel}("
    kernels = usage(work.source, architecture)
    found = [needed for name, needed in kernels.items() if name.startswith(start)]
    if len(found) != 1:
        raise ValueError(f"{start} is {len(found)} of {', '.join(kernels)}")
    registers, static = found[0]
    return registers, static + work.dynamic


def microseconds(work: Work, card: Card) -> dict[str, float]:
    """What each resource needs; the largest is the bound. Few blocks keep as many multiprocessors
    busy.
    """
    busy = min(max(work.blocks, 1), card.multiprocessors)
    clocks = 1e3 * card.gigahertz * busy  # of them all, in a microsecond
    return {
        "memory": work.size / (1e3 * card.gigabytes),
        "L2": max(work.size, work.moved) / (PORT * clocks),
        work.unit: work.operations / (card.rates[work.unit] * clocks),
    }


def cell(work: Work, card: Card) -> str:
    times = microseconds(work, card)
    bound = max(times, key=times.__getitem__)
    registers, shared = needs(work, card.architecture)
    part = occupancy(card.architecture, work.threads, registers, shared)
    return f"{short(times[bound])}, {bound}; {registers}, {part:.0%}"


def whole_token() -> str:
    """The line of all launches of `decode_step`, one after the other."""
    cells = []
    for card in CARDS:
        launches = [work for work in works(card.architecture) if work.count]
        times = sum(work.count * max(microseconds(work, card).values()) for work in launches)
        cells.append(short(times))
    count = sum(work.count for work in launches)
    size, operations = (
        sum(work.count * each(work) for work in launches) / 1e6
        for each in (lambda work: work.size, lambda work: work.operations)
    )
    name = f"decode_step, all {count} launches of int4"
    return f"| {name} | {short(size)} | {short(operations)} | {' | '.join(cells)} |"


def short(number: float) -> str:
    return f"{number:,.0f}" if number >= 10 else f"{number:.2g}"


def table() -> Iterator[str]:
    """Lines of the table."""
    yield f"| launch | MB | MFLOP | {' | '.join(card.name for card in CARDS)} |"
    yield "|---|---|---|" + "---|" * len(CARDS)
    for same in zip(*(works(card.architecture) for card in CARDS), strict=True):
        cells = [cell(work, card) for work, card in zip(same, CARDS, strict=True)]
        first = same[-1]
        sizes = f"{short(first.size / 1e6)} | {short(first.operations / 1e6)}"
        yield f"| {first.name} | {sizes} | {' | '.join(cells)} |"
    yield whole_token()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.parse_args(argv)
    for program in ("nvcc", "c++filt"):
        if shutil.which(program) is None:
            sys.exit(f"scripts/rooflines.py: there is no {program} in PATH")
    try:
        lines = list(table())  # all of them, or none
    except subprocess.CalledProcessError as error:
        sys.exit(f"scripts/rooflines.py: {' '.join(error.cmd)} failed:\n{error.stderr}")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
