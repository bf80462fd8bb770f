"""Other Pythons, with another file as the compiled module."""

import os
import subprocess
import sys


def python(code: str, interpreter: str = sys.executable, **env: str) -> subprocess.CompletedProcess:
    """Run code in another Python, with kernels unless `env` says otherwise."""
    environment = os.environ | {"MLLAMA_DISABLE_OPS": "", "MLLAMA_CPU_ISA": ""} | env
    return subprocess.run(
        [interpreter, "-c", f"import sys\n{code}"], env=environment, capture_output=True, text=True
    )


def replaced(file: str | None) -> str:
    """Code that puts a file in the place of the compiled module; None: there is none."""
    return f"""
import importlib.util

FILE = {file!r}

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "mllama._C":
            if FILE is None:
                raise ModuleNotFoundError("No module named 'mllama._C'", name=name)
            return importlib.util.spec_from_file_location(name, FILE)

sys.meta_path.insert(0, Finder())
"""
