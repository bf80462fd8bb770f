"""A model's tokenizer, config and weights from the hub: `python dev/get_tokenizer.py [ID DIR]`;
PaliGemma where nothing is said.
"""

import sys

from mllama.dropin.commands.get_tokenizer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
