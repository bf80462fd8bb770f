"""What a run shows on stderr: a bar on a terminal, else a line now and then."""

import resource
import sys
import time
from typing import Any

import torch

_LINES = 50  # of a run where stderr is no terminal


class TrainingProgress:
    """Shows the loss, the speed, the memory and the time left.

    Args:
        done: steps that were made before.
        steps: all steps of the run.
        shown: False shows nothing (processes other than the first).
    """

    def __init__(self, done: int, steps: int, shown: bool = True):
        self._first, self._steps, self._shown = done, steps, shown
        self._start = time.perf_counter()
        self._bar: Any = None
        if shown and sys.stderr.isatty():
            from tqdm import tqdm

            # No thread: after a Ctrl-C in the middle of a line it would wait for its lock forever.
            line = type("Line", (tqdm,), {"monitor_interval": 0})
            self._bar = line(
                total=steps, initial=done, file=sys.stderr, unit="step", disable=False, leave=True
            )

    def update(self, step: int, loss: float, speed: float, memory: int) -> None:
        """Show a step.

        Args:
            step: the step that was made.
            loss: its loss.
            speed: tokens per second.
            memory: bytes.
        """
        if not self._shown:
            return
        about = f"loss {loss:.4f}, {speed:,.0f} tokens/s, {memory / 2**30:.2f} GiB"
        if self._bar is not None:
            self._bar.set_postfix_str(about, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        if step % max(1, self._steps // _LINES) == 0 or step == self._steps:
            spent = time.perf_counter() - self._start
            left = spent / (step - self._first) * (self._steps - step)
            self.say(f"step {step}/{self._steps}: {about}, {clock(left)} left")

    def say(self, line: str) -> None:
        """Print a line, above the bar."""
        if not self._shown:
            return
        if self._bar is not None:
            self._bar.write(f"mllama: {line}", file=sys.stderr)
        else:
            print(f"mllama: {line}", file=sys.stderr, flush=True)

    def close(self) -> None:
        """Leave the bar where it is."""
        if self._bar is not None:
            self._bar.close()


def clock(seconds: float) -> str:
    """A duration as H:MM:SS."""
    minutes, seconds = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{seconds:02}"


def peak_memory(device: torch.device) -> int:
    """Bytes at most: of tensors on a CUDA device, else of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
