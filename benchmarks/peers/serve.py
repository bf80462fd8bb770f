"""The child's side of a measurement (see benchmarks/models/worker.py). It runs on the Python of the
engine that it measures, so it imports the standard library only.
"""

import argparse
import contextlib
import json
import os
import resource
import sys
import traceback
from collections.abc import Callable
from typing import Any


def serve(load: Callable[[argparse.Namespace], tuple[dict[str, Any], dict[str, Callable]]]) -> None:
    """Load a model, then answer requests: JSON objects, one a line, on stdin and stdout.

    Args:
        load: from the command line's `model` (a path), `weights`, `threads` and `device` ("cpu", or
            what torch calls another) to what the parent is told (at least `version`), and the
            actions by name. An action takes a request's arguments and returns `seconds` and
            `tokens` if it timed tokens, `bytes` (read in these seconds) if known, and `more`, other
            figures by name, if there are any. What it raises is told as `error`.
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("weights")
    parser.add_argument("threads", type=int)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print goes to stderr
    facts, actions = load(arguments)
    _reply(replies, facts | {"actions": sorted(actions)})
    for line in sys.stdin:
        request = json.loads(line)
        try:
            answer = actions[request.pop("action")](**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answer["peak"] = _peak()
        _reply(replies, answer)


def _peak() -> int:
    """The most memory that this process has had, in bytes. getrusage begins at its parent's."""
    with contextlib.suppress(OSError), open("/proc/self/status") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _reply(replies: Any, answer: dict[str, Any]) -> None:
    replies.write(json.dumps(answer) + "\n")
    replies.flush()
