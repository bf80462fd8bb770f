"""Checks of what users give: whole numbers, and the dtypes of tensors."""

import numbers
from collections.abc import Sequence
from typing import Any

import torch


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise TypeError unless it is an int, ValueError unless it is at least `least`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_floating(name: str, value: Any) -> None:
    """Raise TypeError unless it is a floating tensor."""
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(f"{name} must be a floating torch.Tensor, got {_kind(value)}")


def check_integers(
    name: str, value: Any, dtypes: Sequence[torch.dtype] = (torch.int64, torch.int32)
) -> None:
    """Raise TypeError unless it is a tensor of one of these integer dtypes."""
    if not isinstance(value, torch.Tensor) or value.dtype not in dtypes:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be an {wanted} torch.Tensor, got {_kind(value)}")


def _kind(value: Any) -> str:
    return str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
