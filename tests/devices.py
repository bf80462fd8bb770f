"""The device that operators are tested on, `pytest --device=...`:

- cpu: the CPU kernels.
- emulated: the CUDA kernels, compiled for the CPU with the emulator. Operators that have none, and
  tests of no operator's kernel, are skipped. `make test-emulated`
- ptx: the same, compiled by nvcc to PTX for `--architecture`, 75 or 80. `make test-ptx`
- cuda: the CUDA kernels on a GPU. Tests of operators make their tensors there; `check_op` does not
  let the operators do so by default. `make test-gpu`
"""

import contextlib
from pathlib import Path

import pytest
import torch

import emulated
from mllama import _ext

CHOICES = ("cpu", "emulated", "ptx", "cuda")
TESTS = Path(__file__).parent
# Of tests/cuda: what needs a device, and what runs wherever CUDA kernels do. The rest is of the
# emulator.
ON_A_GPU, EVERYWHERE = ("gpu", "gpu_models"), "every_kernel"
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
    if device == "cuda":
        _compute_exactly()
    _chosen = device


def _compute_exactly() -> None:
    """Let torch's own float32 products, which results are compared with, be float32."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.enable_flash_sdp(False)
    torch.backends.cuda.enable_mem_efficient_sdp(False)
    torch.backends.cuda.enable_cudnn_sdp(False)


def is_emulated() -> bool:
    """Whether mllama's operators run their CUDA kernels on the CPU."""
    return _chosen in ("emulated", "ptx")


def is_compiled() -> bool:
    """Whether what runs on the emulator was compiled by nvcc, and has what the architecture has."""
    return _chosen == "ptx"


def runs_cuda_kernels() -> bool:
    """Whether mllama's operators run their CUDA kernels, on a GPU or on the CPU."""
    return _chosen != "cpu"


def tensor_device() -> str:
    """Where tensors of the tests are: cpu or cuda."""
    return "cuda" if _chosen == "cuda" else "cpu"


def default_for(test_file: Path) -> contextlib.AbstractContextManager:
    """Context in which a test file is imported and its tests run: those of operators make their
    tensors on the device that is tested, unless they are of fake ones.
    """
    moved = test_file.parent == TESTS / "ops" and not test_file.name.startswith("test_fake")
    return torch.device("cuda") if moved and _chosen == "cuda" else contextlib.nullcontext()


def generator(seed: int) -> torch.Generator:
    """Random numbers for tensors of the tests."""
    return torch.Generator(tensor_device()).manual_seed(seed)


# The operator whose kernels a file tests, where it is not named after it.
KERNEL_OF = {"dequantized_linear": "packed_linear", "packed_training": "lora_linear"}


def skip_reason(test_file: Path) -> str | None:
    """Why the tests of a file do not run on this device; None if they do."""
    folder, name = test_file.parent, test_file.stem.removeprefix("test_")
    name = KERNEL_OF.get(name, name)
    if folder == TESTS / "cuda":
        return _other_device(name)
    if not is_emulated() or folder != TESTS / "ops":
        return None
    if name not in _ext.load().build_info()["operators"].split():
        return "tests no kernel"
    return None if name in emulated.operators() else f"{name} has no CUDA kernel yet"


def _other_device(name: str) -> str | None:
    """What a test of tests/cuda needs; None if it runs here."""
    if name in ON_A_GPU:
        return None if _chosen == "cuda" else "needs --device=cuda"
    if name == EVERYWHERE:
        return None if runs_cuda_kernels() else "needs CUDA kernels: --device=emulated, ptx or cuda"
    return None if is_emulated() else "needs the emulator: --device=emulated or ptx"
