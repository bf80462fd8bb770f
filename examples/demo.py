"""Asks the embedded model about the pictures in examples/pictures and checks its answers. `make
demo` runs it.

Exits with 1 when an answer is wrong.
"""

import json
import os
import sys
from pathlib import Path

import mllama

PICTURES = Path(__file__).parent / "pictures"


def main() -> int:
    """Print every question with its answer; return the exit code."""
    sys.stdout.reconfigure(errors="replace")  # the marks, on terminals that lack them
    wrong = 0
    for name, questions in json.loads((PICTURES / "questions.json").read_text()).items():
        print(os.path.relpath(PICTURES / name))
        for question, expected in questions.items():
            answer = mllama.ask(PICTURES / name, question)
            print(
                f"  {question:32} {answer:10} {'✓' if answer == expected else f'✗ it is {expected}'}"
            )
            wrong += answer != expected
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
