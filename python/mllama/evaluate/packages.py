"""Imports the packages of the `eval` extra where they are used."""

import importlib
from types import ModuleType


def needed(module: str, purpose: str) -> ModuleType:
    """Import a module of the extra.

    Raises:
        ValueError: its package is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ValueError(
            f'{purpose} needs {module.partition(".")[0]}: pip install "mllama[eval]" ({error})'
        ) from error
