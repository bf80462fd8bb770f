"""The device that operators are tested on, `pytest --device=...`:

- cpu: the CPU kernels.
- emulated: the CUDA kernels, compiled for the CPU with the emulator. Operators that have none, and
  tests of no operator's kernel, are skipped. `make test-emulated`
- ptx: the same, compiled by nvcc to PTX for `--architecture`, 75 or 80. `make test-ptx`
- cuda: the CUDA kernels on a GPU, with the tensors moved there.
"""

from pathlib import Path

import pytest
import torch

import emulated
from mllama import _ext

CHOICES = ("cpu", "emulated", "ptx", "cuda")
TESTS = Path(__file__).parent
_chosen = "cpu"


def choose(device: str, architecture: int, library: Path | None = None) -> None:
    """Use the device from now on, with another emulated library than the built one if given.

    Raises:
        pytest.UsageError: this machine does not have it, or the emulated library is not built.
    """
    global _chosen
    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError("--device=cuda: torch finds no CUDA device")
    if device in ("emulated", "ptx"):
        name = device if device == "emulated" else f"ptx_{architecture}"
        path = library or emulated.FOLDER / f"libmllama_{name}.so"
        if not path.exists():
            raise pytest.UsageError(f"--device={device}: no {path}; `make test-{device}` builds it")
        emulated.load(path, architecture)
    _chosen = device


def is_emulated() -> bool:
    """Whether mllama's operators run their CUDA kernels on the CPU."""
    return _chosen in ("emulated", "ptx")


def is_compiled() -> bool:
    """Whether the kernels were compiled by nvcc, and have what the architecture has."""
    return _chosen == "ptx"


def tensor_device() -> str:
    """Where tensors of the tests are: cpu or cuda."""
    return "cuda" if _chosen == "cuda" else "cpu"


def skip_reason(test_file: Path) -> str | None:
    """Why the tests of a file do not run on this device; None if they do."""
    folder, name = test_file.parent, test_file.stem.removeprefix("test_")
    if folder == TESTS / "cuda":
        return None if is_emulated() else "needs --device=emulated or ptx"
    if not is_emulated() or folder != TESTS / "ops":
        return None
    if name not in _ext.load().build_info()["operators"].split():
        return "tests no kernel"
    return None if name in emulated.operators() else f"{name} has no CUDA kernel yet"
