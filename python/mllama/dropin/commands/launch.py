"""`dev/launch_inference.sh` without a shell: `inference.py`, its options from variables of the
environment in capitals.
"""

import inspect
import os

from mllama.dropin.commands import answer


def main(arguments: list[str]) -> int:
    """Run `inference.py` with MODEL_PATH, PROMPT, IMAGE_FILE_PATH, MAX_TOKENS_TO_GENERATE,
    TEMPERATURE, TOP_P, DO_SAMPLE and ONLY_CPU.

    Args:
        arguments: options of `inference.py`, which come before the environment.
    """
    names = inspect.getfullargspec(answer.inference).args
    given = [
        f"--{name}={os.environ[name.upper()]}" for name in names if os.environ.get(name.upper())
    ]
    return answer.main([*given, *arguments])
