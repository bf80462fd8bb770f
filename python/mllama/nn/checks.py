"""Checks of whole numbers that users give."""

import numbers
from typing import Any


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise TypeError unless it is an int, ValueError unless it is at least `least`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
