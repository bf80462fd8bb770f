"""A model's files from the hub: `python dev/get_tokenizer.py [ID DIR]`; PaliGemma by default."""

import sys

from mllama.dropin.commands import run

if __name__ == "__main__":
    sys.exit(run("dev/get_tokenizer.py"))
