"""Checks of values before transformers' config classes see them."""

import inspect
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

LABELS_MAX = 2**16  # labels are used by no part of the model


REFUSALS = (StrictDataclassError, AttributeError, TypeError, KeyError, ArithmeticError)
"""Exceptions of transformers' config classes for invalid values."""


def construct(owner: str, constructor: Any, given: Mapping[str, Any]) -> Any:
    """Call a config's constructor, turning its errors for invalid values into ValueError."""
    try:
        return constructor(**given)
    except REFUSALS as error:
        raise ValueError(f"{owner}: {' '.join(str(error).split())}") from error


def check_names(owner: str, kind: type, given: Iterable[str]) -> None:
    """Reject keys that would shadow attributes of the class.

    Raises:
        ValueError: a name is not a field's; the message has it.
    """
    taken = (
        {field.name for field in fields(kind)} if hasattr(kind, "__dataclass_fields__") else set()
    )
    for name in given:
        own = inspect.getattr_static(kind, name, None)
        if (
            name == "self"
            or name.startswith("__")
            or (own is not None and name not in taken and not isinstance(own, property))
        ):
            raise ValueError(f"{owner}: {name!r} is not the name of a field")


def check_common(owner: str, given: Mapping[str, Any]) -> None:
    """Check fields of every config that transformers acts on unchecked: dtypes, kinds of layers,
    the number of labels.

    Raises:
        ValueError: a field is invalid; the message names it.
    """
    for name in ("dtype", "torch_dtype"):
        value = given.get(name)
        if value is None or isinstance(value, torch.dtype):
            continue
        if not isinstance(value, str) or not isinstance(getattr(torch, value, None), torch.dtype):
            raise ValueError(f"{owner}: {name} must be the name of a torch dtype, got {value!r}")
    for name, kind in (("rope_parameters", dict), ("rope_scaling", dict), ("layer_types", list)):
        if not isinstance(given.get(name), (kind, type(None))):
            raise ValueError(
                f"{owner}: {name} must be a {kind.__name__} or None, got {given[name]!r}"
            )
    labels = given.get("num_labels", 0)  # transformers builds a dict of this size
    if not (isinstance(labels, int) and 0 <= labels <= LABELS_MAX):
        raise ValueError(
            f"{owner}: num_labels must be an integer of 0 to {LABELS_MAX}, got {labels!r}"
        )
