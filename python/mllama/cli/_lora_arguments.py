"""The arguments of `mllama lora`. Imports argparse only."""

import argparse

from mllama.cli._arguments import add_command
from mllama.cli._options import DTYPES

_ADAPTER = "a file of mllama.save_lora, a PEFT folder or the file in it"


def add_lora(commands) -> None:
    """Add the command, with `task` and the task's arguments."""
    parser = add_command(commands, "lora", "merge, convert or inspect LoRA adapters")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="TASK")
    _add_merge(tasks)
    _add_convert(tasks)
    _add_inspect(tasks)


def _add_merge(tasks) -> None:
    parser = add_command(tasks, "merge", "write a model, in its own format, with adapters merged")
    parser.add_argument(
        "model", metavar="MODEL", help="a model folder, a GGUF file or a model id on the hub"
    )
    parser.add_argument("adapter", metavar="ADAPTER", help=_ADAPTER)
    parser.add_argument("target", metavar="OUT", help="a folder; written atomically")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of the weights (default: auto, as in MODEL)",
    )
    parser.add_argument(
        "--force",
        action="store_true",
        help="overwrite OUT; files that are not part of a model stay",
    )
    _add_json(parser)


def _add_convert(tasks) -> None:
    parser = add_command(tasks, "convert", "write an adapter in the other format")
    parser.add_argument("source", metavar="IN", help=_ADAPTER)
    parser.add_argument(
        "target", metavar="OUT", help="a folder for --to peft, a *.safetensors file for --to mllama"
    )
    parser.add_argument("--to", required=True, choices=("peft", "mllama"), help="the format")
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="the model that it is for, whose config says how its layers are called; needed for "
        "--to peft",
    )
    parser.add_argument("--force", action="store_true", help="overwrite the adapter in OUT")
    _add_json(parser)


def _add_inspect(tasks) -> None:
    parser = add_command(
        tasks, "inspect", "print an adapter's model, layers, ranks, alphas and sizes"
    )
    parser.add_argument("source", metavar="FILE", help=_ADAPTER)
    parser.add_argument(
        "--model", metavar="MODEL", help="check that it fits this model; exit code 1 if it does not"
    )
    _add_json(parser)


def _add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print one JSON object")
