"""What the tests of scripts and command lines share."""

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

import mllama


@pytest.fixture(scope="session")
def run_python():
    """run_python(*arguments, cwd, path, env) -> CompletedProcess: Python in a process of its own;
    `path` comes first on PYTHONPATH.
    """

    def run(
        *arguments,
        cwd: Path,
        path: str = "",
        env: Mapping[str, str] | None = None,
        program: str = sys.executable,
    ):
        entries = [path, str(Path(mllama.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        variables = (
            os.environ
            | {"PYTHONPATH": os.pathsep.join(filter(None, entries)), "PYTHON": sys.executable}
            | (env or {})
        )
        command = [program, *map(str, arguments)]
        return subprocess.run(
            command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=300
        )

    return run
