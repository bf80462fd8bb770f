"""A run of training in a process of its own, and the memory that it took: for `test_plan.py`.

    python tests/training/measured_run.py SETTINGS.json

Prints the peak of what torch's allocator gave out while steps ran, in bytes, by the allocator's own
reports to the profiler. While a model is loaded, these include files that are mapped.
"""

import json
import sys
import time
from pathlib import Path

import torch

from mllama.train import run
from mllama.train.loop import Loop
from mllama.train.settings import load_settings


class Started(Loop):
    """The loop, which notes when it starts, in nanoseconds."""

    at = 0

    def run(self, stopping) -> None:
        Started.at = time.time_ns()
        super().run(stopping)


def peak_of(profile: torch.profiler.profile, since: int) -> int:
    """The highest sum of the allocations that the profiler saw, from a moment on."""
    events = profile.profiler.kineto_results.events()
    sizes = sorted((one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]")
    live = peak = 0
    for moment, size in sizes:
        live += size
        peak = max(peak, live) if moment >= since else 0
    return peak


def main() -> None:
    torch.set_num_threads(1)
    run.Loop = Started
    settings = load_settings(None, json.loads(Path(sys.argv[1]).read_text()))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        run.train(settings)
    print(peak_of(profile, Started.at))


if __name__ == "__main__":
    main()
