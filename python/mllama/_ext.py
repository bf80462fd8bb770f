"""Loading of the compiled module `mllama._C`, with errors that name cause and cure.

`load()` returns the module, or None where the environment says MLLAMA_DISABLE_OPS=1: then every operator runs its `reference()`.
"""

import functools
import importlib
import os


class OpsUnavailable(ImportError):
    """The compiled operators are missing, or were built for something else than what runs now."""


def disabled() -> bool:
    """True where MLLAMA_DISABLE_OPS=1 asks for the plain-torch references instead of the kernels."""
    value = os.environ.get("MLLAMA_DISABLE_OPS", "0")
    if value not in ("", "0", "1"):
        raise ValueError(f"MLLAMA_DISABLE_OPS must be 0 or 1, got {value!r}")
    return value == "1"


@functools.cache
def load():
    """Import `mllama._C` once. Returns the module, or None when operators are disabled.

    Raises:
        OpsUnavailable: the module is missing or cannot be loaded; the text says why and what to do.
    """
    if disabled():
        return None
    import torch  # first, so that the libraries _C is linked against are resident

    try:
        return importlib.import_module("mllama._C")
    except ImportError as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == "mllama._C"
        cause = "the compiled module mllama._C was not built" if missing else f"mllama._C cannot be loaded: {error}"
        raise OpsUnavailable(
            f"{cause} (torch {torch.__version__}). Build it with `pip install .` or `pip install -e . --no-build-isolation` in the source "
            "folder (needs a C++20 compiler and torch >= 2.11), or set MLLAMA_DISABLE_OPS=1 to run on the slower plain-torch references."
        ) from error
