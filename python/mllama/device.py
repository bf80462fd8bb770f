"""Device and dtype as `mllama.load` and the command line choose them."""

import functools
from typing import Any

import torch

from mllama import _ext

# On a CPU bfloat16 saves memory traffic. Weights that fit in the cache cause none: the embedded
# model takes 52 ms for an answer of 16 tokens in float32 and 60 in bfloat16 (one Zen 4 core).
SMALL_MODEL = 64 * 2**20
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_CPU_FEATURES = (
    "avx2",
    "fma3",
    "f16c",
    "avx512_f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
)


def choose_device(device: str | torch.device) -> torch.device:
    """The device by name; "auto" is the current CUDA device, else the CPU.

    Raises:
        ValueError: the device is unknown or not available.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found).item()
    except Exception as error:  # torch's exception type depends on the device and the build
        raise ValueError(
            f"device {str(device)!r} is not known or not here: {str(error).partition(chr(10))[0]}"
        ) from error
    if found.type == "cpu" and found.index:  # torch accepts any index, the weight reader none
        raise ValueError(f"device {str(device)!r} is not known or not here: there is one cpu")
    return torch.device("cpu") if found.type == "cpu" else found


def dtype_named(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """A dtype that models can be loaded in, by name; None for "auto".

    Raises:
        ValueError: another dtype.
    """
    if dtype in ("auto", None):
        return None
    known = _DTYPES.get(dtype.removeprefix("torch.")) if isinstance(dtype, str) else dtype
    if known not in _DTYPES.values():
        raise ValueError(
            f"dtype must be 'auto', {', '.join(map(repr, _DTYPES))} or one of these torch dtypes, "
            f"got {dtype!r}"
        )
    return known


def choose_dtype(device: torch.device, weight_bytes: int) -> torch.dtype:
    """bfloat16 where the device supports it, float16 on older CUDA devices, else float32. On a CPU
    small models stay in float32.
    """
    if device.type == "cuda":
        return (
            torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
        )
    fast = device.type == "cpu" and not {"avx512_bf16", "amx_bf16"}.isdisjoint(cpu_features())
    return torch.bfloat16 if fast and weight_bytes > SMALL_MODEL else torch.float32


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


def in_range(name: str, exact: torch.Tensor, cast: torch.Tensor) -> torch.Tensor:
    """Return `cast`, numbers that were rounded.

    Raises:
        ValueError: float16 cannot hold them: `cast` has more infinite ones than `exact`.
    """
    if cast.dtype != torch.float16 or cast.is_meta:
        return cast
    infinite = int(cast.isinf().sum())
    if infinite and infinite > int(exact.isinf().sum()):
        raise ValueError(
            f"{name} has values beyond float16's largest, {torch.finfo(torch.float16).max:.0f}: "
            "use bfloat16 or float32"
        )
    return cast


def cpu_features() -> list[str]:
    """Instruction sets of this CPU that the kernels use, by torch's names; empty if unknown."""
    found: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return [name for name in _CPU_FEATURES if found.get(name)]


@functools.cache
def instruction_set(kind: str) -> str:
    """What sums on a type of device are rounded by: a text that is the same on like machines only.

    Raises:
        OpsUnavailable, ValueError: as `mllama._ext.load`.
    """
    if kind == "cuda":
        return f"cuda {torch.cuda.get_device_name()}"
    kernels = "references" if (module := _ext.load()) is None else module.isa()
    return f"{kind} {kernels} {torch.backends.cpu.get_cpu_capability()} {cpu_features()}"
