"""`mllama download ID DIR`."""

import argparse

from mllama.checkpoints.hub import download


def run(arguments: argparse.Namespace) -> None:
    """Download a model's config, tokenizer and weights; print their folder."""
    print(download(arguments.id, local_dir=arguments.folder))
