"""`python -m mllama.dropin`: the folder for PYTHONPATH, scripts run on the older names, and the
older command lines.
"""

import argparse
import importlib
import runpy
import sys
from pathlib import Path

from mllama.cli import run_told
from mllama.dropin import FOLDER
from mllama.dropin.commands import COMMANDS


def main(arguments: list[str]) -> int:
    """Run `python -m mllama.dropin [script.py | NAME] [arguments]`; returns the exit code.

    A script runs as Python would run it: `sys.argv` and `sys.path[0]` are its own, it is
    `__main__`, and it ends with what it raises.
    """
    parser = _parser()
    if not arguments:
        print(FOLDER)
        return 0
    name = arguments[0]
    if name in ("-h", "--help"):
        parser.print_help()
        return 0
    if Path(
        name
    ).is_file():  # first: a script of the reader's own is what a name on the command line means
        sys.argv = list(arguments)
        sys.path[0] = str(Path(name).resolve().parent)
        runpy.run_path(name, run_name="__main__")
        return 0
    modules = {
        spelling: module
        for path, module in COMMANDS.items()
        for spelling in (path, Path(path).stem)
    }
    if name not in modules:
        print(
            f"mllama.dropin: error: there is no script {name!r}, and no command of that name (see --help)",
            file=sys.stderr,
        )
        return 2
    return run_told(
        lambda: importlib.import_module(f"mllama.dropin.commands.{modules[name]}").main(
            arguments[1:]
        )
    )


def _parser() -> argparse.ArgumentParser:
    commands = "\n".join(f"  {Path(path).stem:18}{path}" for path in COMMANDS)
    return argparse.ArgumentParser(
        prog="python -m mllama.dropin",
        usage="%(prog)s [script.py | NAME] [arguments]",
        description="Without arguments: print the folder for PYTHONPATH. With a script: run it on the older module names.\n"
        f"With a name: run that command, as the file that had it:\n\n{commands}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
