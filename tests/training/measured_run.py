"""A run of training in a process of its own, and the memory that it took: for `test_plan.py`.

    python tests/training/measured_run.py SETTINGS.json

Prints the peak of what torch's allocator gave out, in bytes, by the allocator's own reports to the
profiler.
"""

import json
import sys
from pathlib import Path

import torch

from mllama.train.run import train
from mllama.train.settings import load_settings


def peak_of(profile: torch.profiler.profile) -> int:
    """The highest sum of the allocations that the profiler saw."""
    events = profile.profiler.kineto_results.events()
    sizes = sorted((one.start_ns(), one.nbytes()) for one in events if one.name() == "[memory]")
    live = peak = 0
    for _, size in sizes:
        live += size
        peak = max(peak, live)
    return peak


def main() -> None:
    torch.set_num_threads(1)
    settings = load_settings(None, json.loads(Path(sys.argv[1]).read_text()))
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        train(settings)
    print(peak_of(profile))


if __name__ == "__main__":
    main()
