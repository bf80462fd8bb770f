"""Checks of config fields: sizes, numbers, choices, names. Each raises ValueError that names the
owner, the field and the value.
"""

import inspect
from dataclasses import fields
from typing import Any

import torch

# What the attention operator takes.
HEAD_DIM_MIN, HEAD_DIM_MAX = 1, 256
ROPE_TYPES = ("default", "linear", "llama3")
TEXT_ACTIVATIONS = ("silu", "swish", "gelu_pytorch_tanh")
VISION_FEATURES = ("last", "pre_norm")
PROJECTORS = ("mlp", "linear")
FUSIONS = ("merge", "prepend", "cross_attention")
POOLINGS = ("average", "learned")
CROSS_ATTENTION_EVERY = 4  # layers, where the config does not say
# Beyond these a size does not fit torch's 32-bit indices, and a number is infinite in float32.
SIZE_MAX, NUMBER_MAX = 2**31 - 1, torch.finfo(torch.float32).max
LABELS_MAX = 2**16  # no part of the model has labels


def check_size(owner: str, name: str, value: Any, minimum: int = 1) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
        raise ValueError(f"{owner}: {name} must be an integer of at least {minimum}, got {value!r}")
    if value > SIZE_MAX:
        raise ValueError(f"{owner}: {name} must be at most {SIZE_MAX}")


def check_number(owner: str, name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not value > 0:
        raise ValueError(f"{owner}: {name} must be a number above 0, got {value!r}")
    if value > NUMBER_MAX:
        raise ValueError(f"{owner}: {name} must be a number that float32 can hold")


def check_choice(owner: str, name: str, value: Any, choices: tuple) -> None:
    if value not in choices:
        raise ValueError(
            f"{owner}: {name} must be one of {', '.join(map(repr, choices))}, got {value!r}"
        )


def check_reference(reference: str) -> None:
    """Raise ValueError unless it is whose Llama-3.2-Vision to follow: "meta" or "hf"."""
    check_choice("model", "reference", reference, ("meta", "hf"))


def check_names(owner: str, kind: type, given: dict[str, Any]) -> None:
    """Refuse names that would put a value in the place of a part of the class: its methods, its own
    tables, Python's own names.

    Raises:
        ValueError: names such a field.
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


def check_common(owner: str, given: dict[str, Any]) -> None:
    """Check fields that every config has and transformers acts on before it looks: dtypes, kinds of
    layers, how many labels there are.

    Raises:
        ValueError: names the field.
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
    labels = given.get("num_labels", 0)  # transformers makes a dict with as many entries
    if not (isinstance(labels, int) and 0 <= labels <= LABELS_MAX):
        raise ValueError(
            f"{owner}: num_labels must be an integer of 0 to {LABELS_MAX}, got {labels!r}"
        )
