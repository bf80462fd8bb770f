"""The arguments of commands about training data. Imports argparse only."""

import argparse

from mllama.cli._arguments import add_command, add_count, some_text
from mllama.cli._options import add_name, add_reference


def add_data(parser: argparse.ArgumentParser) -> None:
    """Add DATA and what says how it is read."""
    parser.add_argument(
        "data",
        metavar="DATA",
        type=some_text,
        help="a .jsonl, .json or .csv file, a folder of class folders of images, or a data set of "
        "the datasets library",
    )
    parser.add_argument(
        "--image-folder",
        metavar="DIR",
        type=some_text,
        help="images' paths are relative to it (default: the file's folder)",
    )
    parser.add_argument(
        "--question",
        metavar="TEXT",
        type=some_text,
        help="the question about every image, where rows have an answer alone",
    )
    parser.add_argument(
        "--split", metavar="NAME", type=some_text, help="the split of a data set, if it has several"
    )


def add_inspect_labels(commands) -> None:
    """Add the command inspect-labels."""
    parser = add_command(
        commands, "inspect-labels", "print what is trained of a row, token by token"
    )
    add_data(parser)
    add_name(parser)
    add_reference(parser, "as in training (default: meta)")
    add_count(parser, "--row", "which row", default=1)
    add_count(parser, "--rows", "rows of the summary, from the first", default=100)
    add_count(parser, "--max-length", "cut rows to N tokens", least=2)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
