"""Answer one prompt, with the options of ../inference.py.

python dev/inference.py --model_path DIR --prompt TEXT --image_file_path FILE
"""

import sys

from mllama.dropin.commands import run

if __name__ == "__main__":
    sys.exit(run("dev/inference.py"))
