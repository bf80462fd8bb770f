"""The command line: `mllama ask`, `mllama chat`, `mllama info`. Nothing but argparse is imported until a command runs.

Exit codes: 0; 2 where something given cannot be used or fails, with one line on stderr; 130 after Ctrl-C; 141 where nobody reads the
output. With MLLAMA_TRACEBACK=1 an error is raised, not told.
"""

import argparse
import importlib
import math
import os
import sys
import warnings

from mllama import __version__
from mllama._ext import OpsUnavailable

_LONGEST_ERROR = 1000


class _Parser(argparse.ArgumentParser):
    """Errors in one line; argparse would print the usage above them."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands; what it returns has `command` and that command's arguments."""
    whole = "An error is one line; MLLAMA_TRACEBACK=1 in the environment shows it whole."
    parser = _Parser(prog="mllama", description="Ask questions about pictures.", epilog=whole)
    parser.add_argument("--version", action="version", version=f"mllama {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    ask = commands.add_parser("ask", help="answer one question about a picture", description="Answer one question about a picture.")
    ask.add_argument("picture", metavar="PICTURE", help="a picture file")
    ask.add_argument("question", metavar="QUESTION", type=_text, help="in quotes")
    _add_model(ask)
    ask.add_argument("--json", action="store_true", help="print one JSON object instead of streaming the answer")

    talk = "Talk about a picture: a question a line; /exit or the end of input ends."
    chat = commands.add_parser("chat", help="talk about a picture", description=talk)
    chat.add_argument("picture", metavar="PICTURE", help="a picture file")
    _add_model(chat)

    machine = "What is installed and what this machine can do."
    info = commands.add_parser("info", help="what is installed and what this machine can do", description=machine)
    info.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(argv: list[str] | None = None) -> int:
    """Run a command line; returns the exit code. `argv` is sys.argv's by default."""
    try:
        _open_streams()
        try:
            arguments = build_parser().parse_args(argv)
            _quieten()
            importlib.import_module(f"mllama.cli.{arguments.command}").run(arguments)
        finally:
            sys.stdout.flush()  # here, where it may fail: in the interpreter's last moments it would be noise
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
    return 0


def complain(error: Exception) -> None:
    """Tell of an error in one line on stderr; with its type where it is not of the kinds that are raised to be read by users."""
    told = isinstance(error, (OSError, ValueError, OpsUnavailable)) and str(error)
    text = " ".join((str(error) if told else f"{type(error).__name__}: {error}").split())
    print(f"mllama: error: {text[:_LONGEST_ERROR]}{' ...' * (len(text) > _LONGEST_ERROR)}", file=sys.stderr)


def _open_streams() -> None:
    """Without stderr errors go nowhere; without stdout there is nothing to do; what stdout cannot encode it escapes."""
    if sys.stderr is None:  # so Python has it where it was closed
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115
    if sys.stdout is None:
        raise OSError("stdout is closed")
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="FOLDER", help="a model folder (default: the embedded model)")
    parser.add_argument("--max-new-tokens", type=_number(int, 1), metavar="N", help="longest answer in tokens (default: 128)")
    parser.add_argument("--temperature", type=_number(float, 0), metavar="T", help="sample; the higher, the more freely (0: do not)")
    parser.add_argument(
        "--top-p", type=_number(float, 0, 1, above=True), metavar="P", help="sample from the likeliest tokens that add up to P"
    )
    parser.add_argument("--top-k", type=_number(int, 1), metavar="K", help="sample from the K likeliest tokens")
    parser.add_argument("--seed", type=_number(int, 0, 2**64 - 1), metavar="N", help="of the random numbers")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1 ... (default: auto)")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"), help="default: auto, by the device")


def _text(text: str) -> str:
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def _number(kind: type, least: float, most: float = math.inf, above: bool = False):
    """A parser of int or float that says in its error what it takes; `above`: more than `least`."""
    bounds = f"{'above' if above else 'of at least'} {least}{'' if most == math.inf else f' and at most {most}'}"

    def parse(text: str):
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value <= most or value == math.inf or (above and value == least):
            raise argparse.ArgumentTypeError(
                f"must be a {'whole ' * (kind is int)}number {bounds}, got {text[:40]!r}{' ...' * (len(text) > 40)}"
            )
        return value

    return parse


def _quieten() -> None:
    """Warnings of the libraries underneath are for their developers; progress bars are for terminals."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
    if not sys.stderr.isatty():
        os.environ["TQDM_DISABLE"] = "1"
