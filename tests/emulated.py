"""The CUDA kernels that run on the CPU: a library for tests, built by `make test-emulated`."""

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path

LIBRARY = Path(__file__).parent.parent / "build/emulated/libmllama_emulated.so"
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


@functools.cache
def library() -> ctypes.CDLL:
    """The library, loaded once. From then on mllama's operators that have a CUDA kernel run it."""
    import mllama.ops  # noqa: F401  registers the CPU kernels, which are replaced

    library = ctypes.CDLL(str(LIBRARY))
    library.mllama_emulator_operators.restype = ctypes.c_char_p
    return library


def operators() -> list[str]:
    """The operators' files, such as rms_norm, that have a CUDA kernel."""
    return library().mllama_emulator_operators().decode().split()


def set_options(
    architecture: int = 80, order: str | None = None, arrival: str = "late", seed: int = 0
) -> None:
    """Choose the device's architecture (75, 80, 86 or 90), and how threads are scheduled; without
    an order it changes from launch to launch.
    """
    library().mllama_emulator_set(
        architecture, order is None, ORDERS.index(order or "forward"), ARRIVALS.index(arrival), seed
    )


def take_counters() -> Counters:
    """The counters, which start again at 0."""
    values = (ctypes.c_uint64 * 6)()
    library().mllama_emulator_take_counters(values)
    return Counters(*values)
