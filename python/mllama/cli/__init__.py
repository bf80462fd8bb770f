"""The command line: `mllama --help` lists the commands, each a module of its name. Nothing but
argparse is imported until one runs.

Exit codes: 0; 1 where `inspect` or `verify` found something wrong; 2 where something given cannot
be used or fails, with one line on stderr; 130 after Ctrl-C; 141 where nobody reads the output. With
MLLAMA_TRACEBACK=1 an error is raised, not told.
"""

import importlib
import os
import sys
import warnings
from collections.abc import Callable

from mllama._ext import OpsUnavailable
from mllama.cli._parser import build_parser

_LONGEST_ERROR = 1000


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code. `argv` is sys.argv's by default."""

    def work() -> int | None:
        arguments = build_parser().parse_args(argv)
        quieten()
        return importlib.import_module(f"mllama.cli.{arguments.command}").run(arguments)

    return run_told(work)


def run_told(work: Callable[[], int | None]) -> int:
    """Run `work` as a command is run: what it raises is told in one line; returns the exit code,
    which is `work`'s where it ends well.
    """
    try:
        _open_streams()
        try:
            return work() or 0
        finally:
            # here, where it may fail: in the interpreter's last moments it would be noise
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
    """Tell of an error in one line on stderr; with its type where it is not of the kinds that are
    raised to be read by users.
    """
    told = isinstance(error, (OSError, ValueError, OpsUnavailable)) and str(error)
    text = " ".join((str(error) if told else f"{type(error).__name__}: {error}").split())
    print(
        f"mllama: error: {text[:_LONGEST_ERROR]}{' ...' * (len(text) > _LONGEST_ERROR)}",
        file=sys.stderr,
    )


def _open_streams() -> None:
    """Without stderr errors go nowhere; without stdout there is nothing to do; what stdout cannot
    encode it escapes.
    """
    if sys.stderr is None:  # so Python has it where it was closed
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise OSError("stdout is closed")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def quieten() -> None:
    """Warnings of the libraries underneath are for their developers; progress bars are for
    terminals.
    """
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
