"""What one adapter adds to one linear layer."""

import numbers
import re
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import nn

from mllama.nn.checks import check_count
from mllama.nn.packed import PackedLinear

_FLOAT32 = torch.finfo(torch.float32)
DEFAULT = "default"  # name of the adapter of a layer that was converted without one
# Attributes of an adapter, and of the layer that it is the current one of.
FIELDS = ("lora_a", "lora_b", "dropout", "lora_magnitude", "rank", "alpha")


class Options(NamedTuple):
    """What a new adapter is made with, see `Linear_LORA`."""

    rank: int
    alpha: float
    dropout: float = 0.0
    dora: bool = False


class Magnitude(nn.Module):
    """DoRA's magnitudes (Liu et al., 2024): a trained factor for each row of the direction.

    Args:
        weight: [out_dim], the initial norms.
    """

    def __init__(self, weight: torch.Tensor):
        super().__init__()
        self.weight = nn.Parameter(weight)


class Adapter(nn.Module):
    """A new adapter for a linear layer: A is initialized as nn.Linear's weights are (Kaiming
    uniform), B with zeros, DoRA's magnitudes with the norms of the weight's rows, so that it
    changes nothing yet. float32, or float64 beside a layer of that dtype.

    Args:
        linear: the layer, for sizes, device and training mode.
        rank, alpha, dropout: as `Linear_LORA` takes them.
        dora: whether it has magnitudes.

    Attributes:
        lora_a, lora_b: nn.Linear with A [rank, in_dim] and B [out_dim, rank].
        dropout: an nn.Dropout.
        lora_magnitude: a `Magnitude`, or None.
        rank, alpha: as given.
    """

    lora_a: nn.Linear
    lora_b: nn.Linear
    lora_magnitude: Magnitude | None
    dropout: nn.Dropout
    rank: int
    alpha: float

    def __init__(
        self,
        linear: nn.Linear | PackedLinear,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dora: bool = False,
    ):
        super().__init__()
        like = matrix_of(linear)
        dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
        options: dict[str, Any] = {"bias": False, "device": like.device, "dtype": dtype}
        self.lora_a = nn.Linear(linear.in_features, rank, **options)
        self.lora_b = nn.Linear(rank, linear.out_features, **options)
        nn.init.zeros_(self.lora_b.weight)
        self.dropout = nn.Dropout(float(dropout))
        self.lora_magnitude = Magnitude(row_norms(dense_weight(linear))) if dora else None
        self.rank, self.alpha = rank, alpha
        self.train(linear.training)


def parts_of(adapter: Any) -> dict[str, nn.Parameter]:
    """Parameters of an `Adapter`, or of a layer's current one, by their names in files."""
    modules = (("lora_a", adapter.lora_a), ("lora_b", adapter.lora_b))
    parts = {f"{name}.weight": module.weight for name, module in modules}
    if adapter.lora_magnitude is not None:
        parts["lora_magnitude.weight"] = adapter.lora_magnitude.weight
    return parts


def name_adapters(
    state_dict: dict[str, torch.Tensor], prefix: str, current: str, inactive: Collection[str]
) -> None:
    """Rename a layer's keys in a state that was saved with another one of the same adapters in use:
    then that one's name is missing from its inactive ones, and the current one's is there.
    """
    start = f"{prefix}inactive."
    inside = {key: key.removeprefix(start) for key in state_dict if key.startswith(start)}
    theirs = {key.partition(".")[0] for key in inside.values()}
    missing = set(inactive) - theirs
    if len(missing) != 1 or current not in theirs:
        return
    (other,) = missing
    own = tuple(f"{prefix}{field}." for field in FIELDS)
    moved = {
        f"{start}{other}.{key.removeprefix(prefix)}": state_dict.pop(key)
        for key in list(state_dict)
        if key.startswith(own)
    }
    for key, part in inside.items():
        if part.startswith(f"{current}."):
            state_dict[prefix + part.removeprefix(f"{current}.")] = state_dict.pop(key)
    state_dict |= moved


def options_of(adapter: Any) -> Options:
    """What an `Adapter`, or a layer's current one, was made with."""
    dora = adapter.lora_magnitude is not None
    return Options(int(adapter.rank), adapter.alpha, adapter.dropout.p, dora)


def matrix_of(linear: nn.Linear | PackedLinear) -> torch.Tensor:
    """The tensor that holds a layer's weight, packed or not."""
    return linear.packed if isinstance(linear, PackedLinear) else linear.weight


def dense_weight(linear: nn.Linear | PackedLinear) -> torch.Tensor:
    """[out_dim, in_dim], unpacked where it is packed."""
    return linear.dense() if isinstance(linear, PackedLinear) else linear.weight


def row_norms(weight: torch.Tensor) -> torch.Tensor:
    """[out_dim], L2 norms of a matrix's rows in float32 or wider."""
    kind = torch.promote_types(weight.dtype, torch.float32)
    return torch.linalg.vector_norm(weight.detach(), dim=1, dtype=kind)


def check_adapter(rank: int, alpha: float, dropout: float = 0.0) -> None:
    """Raise TypeError or ValueError for an invalid rank, alpha or dropout."""
    check_count("rank", rank)
    for name, value in (("alpha", alpha), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not _FLOAT32.tiny <= alpha <= _FLOAT32.max:  # else the scale would be 0 or infinite
        raise ValueError(f"alpha must be above 0 and finite in float32, got {alpha}")
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout must be at least 0 and below 1, got {dropout}")


def check_name(name: str) -> None:
    """Raise TypeError or ValueError for a name that no adapter may have: it becomes a part of
    dotted names, and a folder's name.
    """
    if not isinstance(name, str):
        raise TypeError(f"an adapter's name must be a str, got {type(name).__name__}")
    if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or hasattr(nn.ModuleDict, name):
        raise ValueError(
            f"an adapter's name must consist of letters, digits, _ and - and be no attribute of "
            f"nn.ModuleDict, got {name!r}"
        )
