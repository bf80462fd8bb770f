"""The memory of this machine, and sizes as people write them."""

import re
from pathlib import Path

import torch

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_BINARY = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = re.compile(r"\s*(\d{1,12}(?:\.\d{1,6})?)\s*([KMGT]?)(i?)B?\s*", re.IGNORECASE)
_MEMINFO = Path("/proc/meminfo")
_STATUS = Path("/proc/self/status")
# Limits of containers: cgroup's second version, and its first.
_LIMITS = (
    (Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")),
    (
        Path("/sys/fs/cgroup/memory/memory.limit_in_bytes"),
        Path("/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ),
)


def parse_bytes(text: str) -> int:
    """A size such as "8GB", "7.5 GiB" or "512M" in bytes. GB are 10**9, GiB 2**30.

    Raises:
        ValueError: it is no size above 0.
    """
    found = _SIZE.fullmatch(text)
    if found is None or (found[3] and not found[2]):
        raise ValueError(
            f"a size must be a number with a unit, such as 8GB or 7.5GiB, got {text!r}"
        )
    units = _BINARY if found[3] else _UNITS
    size = int(float(found[1]) * units[found[2].upper()])
    if not size:
        raise ValueError(f"a size must be above 0, got {text!r}")
    return size


def available_memory(device: torch.device) -> int | None:
    """Bytes that are free: of a CUDA device, or of the host, within a container's limit. None if
    the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _kilobytes(_MEMINFO, "MemAvailable")
    limits = [_free_of_limit(*files) for files in _LIMITS]
    return min((one for one in (free, *limits) if one is not None), default=None)


def resident_memory() -> int:
    """Bytes of this process in memory; 0 if the system does not say."""
    return _kilobytes(_STATUS, "VmRSS") or 0


def _kilobytes(file: Path, name: str) -> int | None:
    """A line of one of /proc's files in bytes."""
    try:
        found = re.search(rf"^{name}:\s+(\d+) kB", file.read_text(), re.MULTILINE)
    except OSError:
        return None
    return None if found is None else int(found[1]) * 1024


def _free_of_limit(limit: Path, used: Path) -> int | None:
    try:
        return max(int(limit.read_text()) - int(used.read_text()), 0)
    except (OSError, ValueError):  # there is none, or it is "max"
        return None
