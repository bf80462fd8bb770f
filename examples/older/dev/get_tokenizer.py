"""Download a model's tokenizer, config and weights: `python dev/get_tokenizer.py [ID DIR]`.

The default is PaliGemma.
"""

import sys

from mllama.dropin.commands import run

if __name__ == "__main__":
    sys.exit(run("dev/get_tokenizer.py"))
