"""Loads the compiled module `mllama._C`; errors name the cause and the fix.

`load()` returns the module, or None with MLLAMA_DISABLE_OPS=1: every operator then runs its
`reference()`.
"""

import functools
import importlib
import os
import platform


class OpsUnavailable(ImportError):
    """The compiled operators are missing, or were built for another Python or torch."""


def disabled() -> bool:
    """Whether MLLAMA_DISABLE_OPS=1 selects the plain-torch references."""
    value = os.environ.get("MLLAMA_DISABLE_OPS", "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"MLLAMA_DISABLE_OPS must be 0 or 1, got {value!r}")
    return value == "1"


def unavailable(cause: str) -> OpsUnavailable:
    """The error for operators that cannot be used, with its cause and how to fix it."""
    import torch

    return OpsUnavailable(
        f"{cause} (Python {platform.python_version()}, torch {torch.__version__}). "
        "Build it with `pip install .` or `pip install -e . --no-build-isolation` in the source "
        "folder (needs a C++20 compiler and torch >= 2.11), or set MLLAMA_DISABLE_OPS=1 to run on "
        "the slower plain-torch references."
    )


@functools.cache
def load():
    """Import `mllama._C` once. Returns the module, or None when operators are disabled.

    Raises:
        OpsUnavailable: the module is missing or cannot be loaded.
        ValueError: MLLAMA_DISABLE_OPS or MLLAMA_CPU_ISA has an unknown value.
    """
    if disabled():
        return None
    import torch  # noqa: F401  first, so that the libraries _C is linked against are resident

    try:
        module = importlib.import_module("mllama._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "mllama._C"
        cause = (
            "the compiled module mllama._C is not there for this Python"
            if missing
            else f"mllama._C cannot be loaded: {error}"
        )
        raise unavailable(cause) from error
    try:
        module.isa()
    except ValueError as error:
        raise ValueError(f"MLLAMA_CPU_ISA: {error}") from None
    return module
