"""One question about one image: `python Inference/Inference.py --image FILE --prompt TEXT`."""

import sys

from mllama.dropin.commands import run

if __name__ == "__main__":
    sys.exit(run("Inference/Inference.py"))
