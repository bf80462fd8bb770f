"""`dev/get_tokenizer.py`: a model's tokenizer, config and weights from the hub. It is `mllama download`."""

from mllama import cli


def main(arguments: list[str]) -> int:
    """Run `mllama download ID DIR`; returns the exit code."""
    return cli.main(["download", *arguments])
