"""Cold starts: from the start of a process to the first text that it writes to stdout."""

import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.models.files import packaged
from benchmarks.models.worker import thread_variables

IMAGE = Path(__file__).parents[2] / "examples/pictures/photograph.jpg"
MLLAMA = [sys.executable, "-m", "mllama"]


def commands() -> dict[str, list[str]]:
    """Command lines by what the table calls them."""
    found = {
        "`import torch`": [sys.executable, "-c", "import torch; print(1)"],
        "`mllama ask`, embedded model": [*MLLAMA, "ask", str(IMAGE), "What color is the star?"],
    }
    if (model := packaged()) is not None:
        prompt = ["--model", str(model), "--prompt", "What is the capital of France?"]
        generate = [*MLLAMA, "generate", *prompt, "--max-new-tokens", "4"]
        found["`mllama generate`, SmolLM2"] = generate
    return found


def measure_cold_starts(threads: int, rounds: int) -> dict[str, Any]:
    """Seconds by command, in turn, after one start of each that fills the page cache."""
    lines = commands()
    seconds: dict[str, list[float]] = {name: [] for name in lines}
    for turn in range(rounds + 1):
        for name, command in lines.items():
            taken = first_output(command, threads)
            if turn:
                seconds[name].append(taken)
        print(f"cold start: round {turn} of {rounds}", file=sys.stderr)
    versions = f"mllama {version('mllama')}, torch {version('torch')}"
    return {
        "version": versions,
        "rows": [
            {
                "case": name,
                "seconds": round(statistics.median(taken), 3),
                "rounds": [round(one, 3) for one in taken],
            }
            for name, taken in seconds.items()
        ],
    }


def first_output(command: list[str], threads: int) -> float:
    """Seconds until a command's first byte on stdout.

    Raises:
        RuntimeError: it ended without one.
    """
    start = time.perf_counter()
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=thread_variables(threads)
    ) as process:
        first = process.stdout.read(1)
        seconds = time.perf_counter() - start
        _, errors = process.communicate()
    if not first or process.returncode:
        raise RuntimeError(f"{command} failed: {errors.decode()[-500:]}")
    return seconds
