"""Answer one question about an image.

python Inference/Inference.py --image FILE --prompt TEXT --model-id ID
"""

import sys

from mllama.dropin.commands import run

if __name__ == "__main__":
    sys.exit(run("Inference/Inference.py"))
