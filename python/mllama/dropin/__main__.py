"""`python -m mllama.dropin`: the folder for PYTHONPATH, scripts, and the older command lines."""

import runpy
import sys
from pathlib import Path

from mllama.cli import run_told
from mllama.dropin import FOLDER

_USAGE = """usage: python -m mllama.dropin [script.py | NAME] [arguments]

Without arguments: print the folder for PYTHONPATH. With a script: run it on the older module names.
With a name: run that command, as the file that had it:
"""


def main(arguments: list[str]) -> int:
    """Run a command line; returns the exit code.

    A script runs as Python would run it: `sys.argv` and `sys.path[0]` are its own, it is
    `__main__`, and it ends with what it raises.
    """
    if not arguments:
        print(FOLDER)
        return 0
    name = arguments[0]
    if Path(name).is_file():  # the user's own script comes before a command of that name
        sys.argv = list(arguments)
        sys.path[0] = str(Path(name).resolve().parent)
        runpy.run_path(name, run_name="__main__")
        return 0
    return run_told(lambda: _command(name, arguments[1:]))


def _command(name: str, arguments: list[str]) -> int:
    from mllama.dropin.commands import COMMANDS

    if name in ("-h", "--help"):
        print(_USAGE, *(f"  {Path(path).stem:18}{path}" for path in COMMANDS), sep="\n")
        return 0
    named = {Path(path).stem: run for path, run in COMMANDS.items()} | COMMANDS
    if name not in named:
        raise ValueError(f"no script and no command is called {name!r}; see --help")
    return named[name](arguments)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
