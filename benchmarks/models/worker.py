"""The parent's side of a measurement: an engine with one model, in a process of its own."""

import contextlib
import json
import math
import os
import selectors
import subprocess
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PEERS = Path(__file__).parents[1] / "peers"
MOST_SECONDS = 1800  # for loading, or for an action
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")


class WorkerError(Exception):
    """A worker that failed in an action, ended, or did not answer in time."""


def thread_variables(threads: int) -> dict[str, str]:
    """Environment variables that limit a process to some threads, and let them spin as they do by
    default.
    """
    others = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    return others | dict.fromkeys(_THREADS, str(threads))


class Worker:
    """One of benchmarks/peers/<engine>_worker.py, loaded with a model.

    Args:
        engine: the file's name without `_worker.py`.
        python: the interpreter that runs it.
        model: path of the model.
        weights: what the worker takes it as.
        threads: of the engine.
        device: of torch, for workers that have one.
        limit: most seconds for loading and all actions together.

    Attributes:
        facts: what the worker said once it had loaded: `version`, `actions`.
        load_seconds: until then.

    Raises:
        WorkerError: it did not load.
    """

    def __init__(
        self,
        engine: str,
        python: str,
        model: Path,
        weights: str,
        threads: int,
        device: str = "cpu",
        limit: float = math.inf,
    ):
        start, where = time.perf_counter(), [] if device == "cpu" else ["--device", device]
        self._end = start + limit
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115  for the child
        self._process = subprocess.Popen(
            [python, PEERS / f"{engine}_worker.py", model, weights, str(threads), *where],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=thread_variables(threads),
            text=True,
        )
        try:
            self.facts: Mapping[str, Any] = self._read()
        except BaseException:
            self.close()
            raise
        self.load_seconds = time.perf_counter() - start

    def ask(self, action: str, **arguments: Any) -> dict[str, Any]:
        """One measurement: `seconds` and `tokens`, if tokens were timed; `bytes` if known; `more`
        figures by name; and `peak`, the most memory that the process has had, in bytes.

        Raises:
            WorkerError: it failed; where it did not answer, it is closed.
        """
        with contextlib.suppress(BrokenPipeError):  # reading tells why
            self._process.stdin.write(json.dumps({"action": action, **arguments}) + "\n")
            self._process.stdin.flush()
        answer = self._read()
        if "error" in answer:
            raise WorkerError(answer["error"])
        return answer

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        self._process.kill()
        self._process.communicate()

    def _read(self) -> dict[str, Any]:
        seconds = max(0.0, min(MOST_SECONDS, self._end - time.perf_counter()))
        with selectors.DefaultSelector() as selector:
            selector.register(self._process.stdout, selectors.EVENT_READ)
            if not selector.select(seconds):
                self.close()
                raise WorkerError(f"no answer in {seconds:.0f} s")
        if line := self._process.stdout.readline():
            return json.loads(line)
        self._process.wait()
        self._errors.seek(0)
        raise WorkerError("\n".join(self._errors.read().strip().splitlines()[-3:]))
