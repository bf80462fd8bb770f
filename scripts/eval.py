"""`mllama eval`, from a checkout: python scripts/eval.py DATA"""

import sys

from mllama.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
