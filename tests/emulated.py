"""The CUDA kernels that run on the CPU. There are several libraries; tests load one."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "build/emulated"
ARCHITECTURES = (75, 80, 86, 90)
ORDERS, ARRIVALS = ("forward", "reverse", "random"), ("late", "early")


@dataclass
class Counters:
    """What the emulator has run since they were read last."""

    launches: int
    blocks: int
    threads: int
    switches: int
    collectives: int
    accesses: int


_library: ctypes.CDLL | None = None
_architecture = 80


def load(path: Path, architecture: int) -> None:
    """Load a library: from now on mllama's operators that have a CUDA kernel run it, as a device
    of the architecture would.
    """
    import mllama.ops  # noqa: F401  registers the CPU kernels, which are replaced

    global _library, _architecture
    _library, _architecture = ctypes.CDLL(str(path)), architecture
    _library.mllama_emulator_operators.restype = ctypes.c_char_p


def library() -> ctypes.CDLL:
    """The library that was loaded."""
    assert _library is not None
    return _library


@functools.cache
def operators() -> list[str]:
    """The operators' files, such as rms_norm, that have a CUDA kernel."""
    return library().mllama_emulator_operators().decode().split()


def architecture() -> int:
    """That of the device which the library stands for."""
    return _architecture


def set_options(
    order: str | None = None, arrival: str = "late", seed: int = 0, architecture: int | None = None
) -> None:
    """Choose how threads are scheduled, which changes from launch to launch without an order, and
    an architecture other than the loaded one.
    """
    rotate, order = order is None, ORDERS.index(order or "forward")
    architecture = architecture or _architecture
    library().mllama_emulator_set(architecture, rotate, order, ARRIVALS.index(arrival), seed)


def take_counters() -> Counters:
    """The counters, which start again at 0."""
    values = (ctypes.c_uint64 * 6)()
    library().mllama_emulator_take_counters(values)
    return Counters(*values)
