"""The status line of commands that let their user wait."""

import os
import shutil
import sys
from typing import Any

from mllama.runtime.progress import DECODE, IMAGE, LOAD, PROMPT

_FORMATS = {
    LOAD: "mllama: loading {percentage:3.0f}% of {total_fmt} parameters",
    IMAGE: "mllama: image {n_fmt}/{total_fmt}",
    PROMPT: "mllama: prompt {n_fmt}/{total_fmt} tokens",
    DECODE: "mllama: {n_fmt} tokens, {rate_noinv_fmt}",
}


class Status:
    """Shows the stage of a generation on stderr, in one line that is cleared at the end. Shows
    nothing where stderr is no terminal, or one that cannot clear a line.

    It is a `Progress`; leaving its context clears the line.

    Args:
        streams: the answer is written to stdout while it is generated; where that is a terminal the
            line is cleared before.
    """

    def __init__(self, streams: bool):
        self._shown = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
        self._hidden = DECODE if streams and sys.stdout.isatty() else None
        self._stage: str | None = None
        self._drawn = False  # there is something to clear; the line may not be open yet
        self._line: Any = None

    def __call__(self, stage: str, done: int, total: int) -> None:
        """Show what is done of a stage."""
        if not self._shown:
            return
        if stage != self._stage:
            self.clear()
            self._stage = stage
            if stage != self._hidden:
                self._drawn = True
                self._line = _open_line(stage, done, total)
        elif self._line is not None:
            self._line.update(done - self._line.n)

    def clear(self) -> None:
        """Clear the line; the next call shows it again."""
        if self._line is not None:
            self._line.close()
        if self._drawn:  # also the "^C" that Ctrl-C leaves behind the line
            print("\r\033[K", end="", file=sys.stderr, flush=True)
        self._stage, self._drawn, self._line = None, False, None

    def __enter__(self) -> "Status":
        return self

    def __exit__(self, *error: object) -> None:
        self.clear()


def _open_line(stage: str, done: int, total: int) -> Any:
    from tqdm import tqdm  # slow to import

    class Line(tqdm):
        # No thread: after a Ctrl-C in the middle of a line it would wait for its lock forever.
        monitor_interval = 0

        def __del__(self) -> None:
            """Nothing: lines are closed by `clear`. tqdm's would close one that Ctrl-C left half
            made, which prints an error, and would lose a Ctrl-C that comes meanwhile.
            """

    form = _FORMATS[stage] if total or stage == DECODE else _FORMATS[stage].split(" {")[0]
    columns, lines = shutil.get_terminal_size()  # tqdm shows nothing where the size is not known
    return Line(
        total=total or None,
        initial=done,
        bar_format=form,
        unit=" tokens",
        unit_scale=stage == LOAD,
        smoothing=0,  # the rate is the average
        ncols=columns,
        nrows=lines,
        leave=False,
        file=sys.stderr,
    )
