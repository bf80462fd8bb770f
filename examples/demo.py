"""Ask the embedded model about the images in examples/pictures and check its answers (`make demo`).

Exits with 1 if an answer is wrong.
"""

import json
import os
import sys
from pathlib import Path

import mllama

IMAGES = Path(__file__).parent / "pictures"


def main() -> int:
    """Print every question with its answer and return the exit code."""
    sys.stdout.reconfigure(errors="replace")  # terminals without ✓
    wrong = 0
    for name, questions in json.loads((IMAGES / "questions.json").read_text()).items():
        print(os.path.relpath(IMAGES / name))
        for question, expected in questions.items():
            answer = mllama.ask(IMAGES / name, question)
            mark = "✓" if answer == expected else f"✗ it is {expected}"
            print(f"  {question:32} {answer:10} {mark}")
            wrong += answer != expected
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
