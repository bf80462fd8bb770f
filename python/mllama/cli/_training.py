"""The arguments of the commands that train, from the table of settings."""

import argparse

from mllama.cli._arguments import add_command
from mllama.train.keys import add_flag, of_flag
from mllama.train.settings import GROUPS, keys


def add_train(commands) -> None:
    """Add `train`."""
    parser = add_command(
        commands, "train", "fine-tune a model on conversations about images, by LoRA or in full"
    )
    parser.usage = "mllama train [CONFIG.yaml] [--resume] [--json] [--KEY VALUE ...]"
    parser.epilog = (
        "Every key of CONFIG is a flag, too; flags replace keys. Keys without a value here keep "
        "their default. docs/training.md describes them."
    )
    parser.add_argument(
        "config", metavar="CONFIG", nargs="?", help="a YAML file of the keys below; before flags"
    )
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue the run in the output folder from its last checkpoint, or begin it",
    )
    parser.add_argument(
        "--check",
        action="store_true",
        help="only check, on one batch: labels, gradients, frozen weights, whether it is learned",
    )
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON object")
    add_settings(parser)


def add_settings(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each key of a run's settings, in groups."""
    group = parser.add_argument_group()
    for name, field in keys().items():
        if name in GROUPS:
            group = parser.add_argument_group(GROUPS[name])
        add_flag(group, field)


def given_settings(arguments: argparse.Namespace) -> dict:
    """The values of the flags that were given, by key.

    Raises:
        ValueError: a value is not of its key's kind.
    """
    return {
        name: of_flag(field, getattr(arguments, name))
        for name, field in keys().items()
        if hasattr(arguments, name)
    }
