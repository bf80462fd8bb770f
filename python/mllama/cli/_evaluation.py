"""The arguments of the commands that plan and evaluate. Imports argparse and the keys of `train`."""

from mllama.cli._arguments import add_command, number, some_text
from mllama.cli._training import add_settings


def add_plan(commands) -> None:
    """Add `plan`."""
    parser = add_command(
        commands, "plan", "print the memory that a run of train needs, and what would need less"
    )
    parser.usage = "mllama plan [CONFIG.yaml] [--memory SIZE] [--json] [--KEY VALUE ...]"
    parser.epilog = "Exit code 1 if the run does not fit. No weight is read."
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a config of mllama train; before flags"
    )
    parser.add_argument(
        "--memory",
        metavar="SIZE",
        type=some_text,
        help="the memory that there is, such as 8GB (default: what is free on the device)",
    )
    parser.add_argument(
        "--length",
        metavar="N",
        type=number(int, 2),
        help="tokens of every row (default: those of the longest of the first 100 rows)",
    )
    parser.add_argument(
        "--switches", action="store_true", help="try other settings where the run fits, too"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_settings(parser)
