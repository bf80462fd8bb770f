"""`mllama download ID DIR`."""

import argparse

from mllama.checkpoints.hub import download


def run(arguments: argparse.Namespace) -> None:
    """Fetch a model's config, tokenizer and weights; print where they are."""
    print(download(arguments.id, local_dir=arguments.folder))
