"""`python -m mllama.dropin` prints the folder for PYTHONPATH; with a script and its arguments it runs the script on the older names."""

import runpy
import sys
from pathlib import Path

from mllama.dropin import FOLDER


def main(arguments: list[str]) -> None:
    """Run `python -m mllama.dropin [script.py ...]`.

    Raises:
        SystemExit: with one line, where there is no such script.
    """
    if not arguments:
        print(FOLDER)
        return
    script = Path(arguments[0])
    if not script.is_file():
        raise SystemExit(f"mllama.dropin: there is no script {str(script)!r}")
    sys.argv = arguments
    sys.path[0] = str(script.resolve().parent)
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
