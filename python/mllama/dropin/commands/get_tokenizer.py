"""`dev/get_tokenizer.py`: a model's tokenizer, config and weights from the hub. It is `mllama
download`.
"""

from mllama import cli

# What the file fetched that had this command line, and where to.
DEFAULTS = ("google/paligemma-3b-pt-224", "models/paligemma-weights/paligemma-3b-pt-224")


def main(arguments: list[str]) -> int:
    """Run `mllama download ID DIR`, without arguments that of DEFAULTS; returns the exit code."""
    return cli.main(["download", *(arguments or DEFAULTS)])
