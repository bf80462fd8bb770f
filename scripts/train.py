"""`mllama train`, from a checkout: python scripts/train.py CONFIG.yaml"""

import sys

from mllama.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
