"""Runs scripts as `__main__`, each in a process of its own that has imported what costs seconds:
`python run_scripts.py SCRIPT ...`.

Prints one JSON object: {script's stem: {"code": exit code, "out": what it printed, "err": its
traceback and warnings}}.
"""

import json
import os
import runpy
import sys
import tempfile
import traceback
from pathlib import Path

import processing_paligemma  # noqa: F401  loads torch and transformers before the forks
import torch.optim  # noqa: F401
import utils  # noqa: F401
from transformers import AutoTokenizer, LlamaTokenizer  # noqa: F401


def run(script: str) -> dict:
    """Run one script in a fork of this process."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        sys.stdout.flush()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                os.dup2(out.fileno(), 1)
                os.dup2(err.fileno(), 2)
                sys.argv, sys.path[0] = [script], str(Path(script).parent)
                runpy.run_path(script, run_name="__main__")
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else end.code is not None
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        out.seek(0)
        err.seek(0)
        return {
            "code": os.waitstatus_to_exitcode(status),
            "out": out.read().decode(),
            "err": err.read().decode(),
        }


if __name__ == "__main__":
    print(json.dumps({Path(script).stem: run(script) for script in sys.argv[1:]}))
