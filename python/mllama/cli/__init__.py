"""The command line. `mllama --help` lists the commands; each is a module of that name, with _ for
each hyphen.

Only argparse and the keys of `mllama train` are imported until a command runs. Exit codes: 0; 1 if
`inspect` or `verify` found a problem; 2 if an argument cannot be used or a command fails, with one
line on stderr; 130 after Ctrl-C; 143 if `train` was stopped by SIGTERM; 141 if stdout is closed.
MLLAMA_TRACEBACK=1 raises errors instead of printing them.
"""

import importlib
import io
import os
import sys
import warnings
from collections.abc import Callable
from typing import Any

from mllama._ext import OpsUnavailable
from mllama.cli._parser import build_parser

_LONGEST_ERROR = 1000


def main(argv: list[str] | None = None) -> int:
    """Run a command line and return the exit code. `argv` defaults to sys.argv."""

    def work() -> int | None:
        arguments = build_parser().parse_args(argv)
        quieten()
        module = arguments.command.replace("-", "_")
        return importlib.import_module(f"mllama.cli.{module}").run(arguments)

    return run_told(work)


def run_told(work: Callable[[], int | None]) -> int:
    """Run `work` as a command: print what it raises in one line. Returns the exit code, `work`'s
    own if it succeeds.
    """
    try:
        _open_streams()
        try:
            return work() or 0
        finally:
            # Flushed here: a failure at interpreter shutdown would print noise.
            sys.stdout.flush()
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if os.environ.get("MLLAMA_TRACEBACK") == "1":
            raise
        complain(error)
        return 2


def complain(error: Exception) -> None:
    """Print an error in one line on stderr, with its type unless it is a kind raised for users."""
    expected = isinstance(error, (OSError, ValueError, OpsUnavailable)) and str(error)
    text = " ".join((str(error) if expected else f"{type(error).__name__}: {error}").split())
    print(
        f"mllama: error: {text[:_LONGEST_ERROR]}{' ...' * (len(text) > _LONGEST_ERROR)}",
        file=sys.stderr,
    )


class _Droppable(io.FileIO):
    """A file that drops what it cannot write: a full disk or a closed pipe behind stderr must not
    cost the answer on stdout.
    """

    def write(self, data: Any) -> int:
        try:
            return super().write(data) or 0
        except OSError:
            return len(data)


def _open_streams() -> None:
    """Make stderr one that never fails, check stdout, and escape what stdout cannot encode."""
    if sys.stderr is None:  # it was closed
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    elif sys.stderr is sys.__stderr__:
        file: Any = _Droppable(sys.stderr.fileno(), "w", closefd=False)
        named = {"encoding": sys.stderr.encoding, "errors": sys.stderr.errors}
        sys.stderr = io.TextIOWrapper(file, **named, write_through=True)
    if sys.stdout is None:
        raise OSError("stdout is closed")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def quieten() -> None:
    """Silence warnings of libraries, and their progress bars unless stderr is a terminal."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
