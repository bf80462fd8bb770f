"""The stages of a generation: told to a callback while they run, and timed."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

LOAD, IMAGE, PROMPT, DECODE = "load", "image", "prompt", "decode"

# progress(stage, done, total) is called when a stage begins and after each of its steps. `done` and
# `total` are parameters (load), images that are not in memory (image), or tokens of all rows
# (prompt, decode). A prompt begins at its reused tokens; a decode's total is the most that may
# come. A total of 0 is unknown.
Progress = Callable[[str, int, int], None]


@dataclass
class Stage:
    """One stage of a generation.

    Attributes:
        count: what was computed: images or tokens.
        seconds: the time it took.
    """

    count: int = 0
    seconds: float = 0.0

    @property
    def rate(self) -> float | None:
        """Count per second; None if nothing was computed."""
        return self.count / self.seconds if self.count and self.seconds else None


@dataclass
class Timings:
    """How long the stages of a generation took. Tokens are those of all rows.

    Attributes:
        image: the images that were encoded. None are counted where what they give was cached, or
            where transformers' `generate` encodes them with the prompt.
        prompt: the prompt's tokens without the reused ones, up to the selection of the first token.
        decode: the tokens after the first one.
        first_token_seconds: from the call to the first token.
        total_seconds: from the call to the end.
    """

    image: Stage = field(default_factory=Stage)
    prompt: Stage = field(default_factory=Stage)
    decode: Stage = field(default_factory=Stage)
    first_token_seconds: float = 0.0
    total_seconds: float = 0.0


class Stages:
    """Times the stages of one generation, one after the other, and tells them to a callback.

    Args:
        progress: called with every step.

    Attributes:
        timings: complete after `finish`.
    """

    def __init__(self, progress: Progress | None = None):
        self.timings = Timings()
        self._progress = progress
        self._start = self._begun = time.perf_counter()
        self._stage: Stage | None = None
        self._name, self._done, self._total = "", 0, 0

    def begin(self, name: str, total: int, done: int = 0) -> None:
        """End the stage before and begin IMAGE, PROMPT or DECODE."""
        now = self._end()
        if name == DECODE:
            self.timings.first_token_seconds = now - self._start
        self._stage, self._begun = getattr(self.timings, name), now
        self._name, self._done, self._total = name, done, total
        self._tell()

    def advance(self, count: int, computed: bool = True) -> None:
        """Add to what the stage has done; the timings do not count what was not computed."""
        if self._stage is not None and computed:
            self._stage.count += count
        self._done += count
        self._tell()

    def finish(self) -> None:
        """End the last stage."""
        self.timings.total_seconds = self._end() - self._start

    def _end(self) -> float:
        now = time.perf_counter()
        if self._stage is not None:
            self._stage.seconds += now - self._begun
            self._stage = None
        return now

    def _tell(self) -> None:
        if self._progress is not None:
            self._progress(self._name, self._done, self._total)


def check_progress(progress: Progress | None) -> None:
    """Raise TypeError unless it is callable or None."""
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be callable or None, got {type(progress).__name__}")


def loading(progress: Progress | None) -> Callable[[int, int], None] | None:
    """The callback of `mllama.checkpoints.loading.load_weights`: `progress` for the stage LOAD.

    Raises:
        TypeError: progress is not callable.
    """
    check_progress(progress)
    return None if progress is None else partial(progress, LOAD)
