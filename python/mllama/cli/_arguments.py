"""Pieces of the commands' parsers. Imports argparse and the keys of `train`."""

import argparse
import math

from mllama.train import keys


class Parser(argparse.ArgumentParser):
    """Prints errors in one line, without argparse's usage."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")

    def parse_known_args(self, args=None, namespace=None):
        """Collect `words` from all places between options; argparse takes one contiguous run."""
        found, rest = super().parse_known_args(args, namespace)
        words = (
            [word for word in rest if word == "-" or not word.startswith("-")]
            if hasattr(found, "words")
            else []
        )
        if words:
            found.words = [*found.words, *words]
        return found, [word for word in rest if word not in words]


def add_command(commands, name: str, what: str) -> argparse.ArgumentParser:
    """A command's parser; `what` describes it."""
    return commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")


def add_placed(
    parser: argparse.ArgumentParser, name: str, metavar: str, what: str, required: bool = True
) -> None:
    """A command's model, as a positional argument or as --model."""
    which = parser.add_mutually_exclusive_group(required=required)
    which.add_argument(name, metavar=metavar, nargs="?", default=argparse.SUPPRESS, help=what)
    which.add_argument("--model-id", "--model", dest=name, metavar="MODEL", help="the same")


def add_drafts(parser: argparse.ArgumentParser) -> None:
    """What guesses tokens."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--prompt-lookup",
        type=number(int, 1, 15),  # runtime.drafts' MAX_DRAFTS
        metavar="N",
        help="guess up to N tokens for one pass, 1 to 15, where the last ones stood before in the "
        "prompt or the answer: the same text in fewer passes if it repeats itself",
    )
    which.add_argument(
        "--draft-model",
        metavar="MODEL",
        help="guess tokens by a smaller model of text with the same tokenizer: the same text in "
        "fewer passes",
    )


def some_text(text: str) -> str:
    """A type of argument: a text that is not blank."""
    if not text.strip():
        raise argparse.ArgumentTypeError("must not be empty")
    return text


def add_count(
    parser: argparse.ArgumentParser,
    flag: str,
    what: str,
    default: int | None = None,
    least: int = 1,
) -> None:
    """Add an option whose value is a whole number; `what` says of what, without the default."""
    shown = what if default is None else f"{what} (default: {default})"
    parser.add_argument(flag, type=number(int, least), default=default, metavar="N", help=shown)


def number(kind: type, least: float, most: float = math.inf, above: bool = False):
    """A parser for int or float whose error names the range; `above` excludes `least` itself."""
    accepted = keys.number(kind, least, most, above)

    def parse(text: str):
        try:
            return accepted.check(text)
        except ValueError:
            what = f"must be {accepted.what}, got {keys.shown(text)}"
            raise argparse.ArgumentTypeError(what) from None

    return parse
