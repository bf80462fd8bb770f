"""Answer one prompt: `python inference.py --model_path DIR --prompt TEXT --image_file_path FILE`.

dev/launch_inference.sh calls it.
"""

import sys

from mllama.dropin.commands import run

if __name__ == "__main__":
    sys.exit(run("inference.py"))
