"""Weight maps between the tensors of a file and of a model. Rows rename, drop, concatenate, split
and reshape tensors; each is invertible.

A weight map is a list of rows, one per group of tensors. The first row that matches a name applies.
In a pattern `{}` stands for a layer's number and `*` for any rest, the same on both sides. "Ours"
is the model's side, "theirs" the file's.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

Binding = tuple[int | None, str | None]  # values of `{}` and `*` in a pattern


class Step(Protocol):
    """A change of a tensor's values or shape between file and model."""

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Convert the file's tensor to the model's. Raises RuntimeError or ValueError for an
        invalid shape.
        """

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """Convert the model's tensor to the file's."""


@dataclass(frozen=True)
class Permute:
    """Rotary pairs <-> halves: files of Meta and GGUF rotate neighbors (2i, 2i + 1) of a head, the
    model (i, i + d/2).

    Attributes:
        heads: heads along the first axis: query heads for q_proj, key-value heads for k_proj.
    """

    heads: int

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """[heads * d, ...]: pairs -> halves."""
        return (
            tensor.reshape(self.heads, -1, 2, *tensor.shape[1:])
            .transpose(1, 2)
            .reshape(tensor.shape)
        )

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """[heads * d, ...]: halves -> pairs."""
        return (
            tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])
            .transpose(1, 2)
            .reshape(tensor.shape)
        )


@dataclass(frozen=True)
class Reshape:
    """The same values in another shape.

    Attributes:
        ours, theirs: the two shapes.
    """

    ours: tuple[int, ...]
    theirs: tuple[int, ...]

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """theirs -> ours."""
        return _of_shape(tensor, self.theirs).reshape(self.ours)

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """ours -> theirs."""
        return _of_shape(tensor, self.ours).reshape(self.theirs)


@dataclass(frozen=True)
class Shift:
    """A constant difference: ours = theirs + amount."""

    amount: float

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """theirs + amount, in the tensor's dtype."""
        return tensor + self.amount

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """ours - amount, in the tensor's dtype."""
        return tensor - self.amount


def _of_shape(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"must be {list(shape)}")
    return tensor


class Row:
    """One group of tensors: some of the model's, computed from some of the file's.

    Attributes:
        ours: patterns of the model's names.
        theirs: patterns of the file's names, as written.
        spellings: `theirs` and other sets of names that are read but never written.
    """

    def __init__(
        self,
        ours: Sequence[str],
        theirs: Sequence[str],
        also: Sequence[Sequence[str]] = (),
        index: Mapping[int, int] | None = None,
    ):
        """
        Args:
            ours, theirs: see the attributes.
            also: the other spellings.
            index: a file's layer number -> the model's; other layers do not match this row.
        """
        self.ours, self.theirs, self.spellings = (
            tuple(ours),
            tuple(theirs),
            (tuple(theirs), *map(tuple, also)),
        )
        self._ours_of = index
        self._theirs_of = None if index is None else {mine: layer for layer, mine in index.items()}

    def find(self, name: str) -> tuple[Binding, int] | None:
        """Match a file's name: its binding and index in `theirs`, or None."""
        for spelling in self.spellings:
            for place, pattern in enumerate(spelling):
                if (binding := _bind(pattern, name, self._ours_of)) is not None:
                    return binding, place
        return None

    def find_ours(self, name: str) -> tuple[Binding, int] | None:
        """Match a model's name: its binding and index in `ours`, or None."""
        for place, pattern in enumerate(self.ours):
            binding = _bind(pattern, name)
            if binding is not None and (self._theirs_of is None or binding[0] in self._theirs_of):
                return binding, place
        return None

    def our_names(self, binding: Binding) -> list[str]:
        """The model's names for a binding."""
        return [_fill(pattern, binding) for pattern in self.ours]

    def file_names(self, binding: Binding) -> list[str]:
        """The file's names for a binding, as written."""
        layer, rest = binding
        return [
            _fill(pattern, (layer if self._theirs_of is None else self._theirs_of[layer], rest))
            for pattern in self.theirs
        ]

    def read(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """theirs -> ours. Raises RuntimeError or ValueError for invalid shapes."""
        raise NotImplementedError

    def write(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """ours -> theirs."""
        raise NotImplementedError


class Rename(Row):
    """Tensors that are renamed, and changed by the given steps."""

    def __init__(
        self,
        ours: str,
        theirs: str,
        also: Sequence[str] = (),
        steps: Sequence[Step] = (),
        index: Mapping[int, int] | None = None,
    ):
        super().__init__((ours,), (theirs,), [(spelling,) for spelling in also], index)
        self.steps = tuple(steps)

    def read(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        (tensor,) = tensors
        for step in self.steps:
            tensor = step.read(tensor)
        return [tensor]

    def write(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        (tensor,) = tensors
        for step in reversed(self.steps):
            tensor = step.write(tensor)
        return [tensor]


class Drop(Row):
    """Tensors of files that the model does not use: ignored, never written."""

    def __init__(self, theirs: str):
        super().__init__((), (theirs,))

    def read(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return []


class Concat(Row):
    """Several tensors of the file form one of the model's, concatenated along an axis."""

    def __init__(
        self,
        ours: str,
        theirs: Sequence[str],
        dim: int = 0,
        sizes: Sequence[int] | None = None,
        also: Sequence[Sequence[str]] = (),
        index: Mapping[int, int] | None = None,
    ):
        """
        Args:
            ours, theirs, also, index: as `Row`.
            dim: the axis.
            sizes: sizes of the parts along it. Default: equal.
        """
        super().__init__((ours,), theirs, also, index)
        self.dim, self.sizes = dim, sizes

    def read(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [_join(tensors, self.dim, self.sizes)]

    def write(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return _cut(tensors[0], self.dim, len(self.theirs), self.sizes)


class Split(Row):
    """One tensor of the file is split into several of the model's along an axis."""

    def __init__(
        self,
        ours: Sequence[str],
        theirs: str,
        dim: int = 0,
        sizes: Sequence[int] | None = None,
        also: Sequence[str] = (),
        index: Mapping[int, int] | None = None,
    ):
        """Arguments as `Concat`."""
        super().__init__(ours, (theirs,), [(spelling,) for spelling in also], index)
        self.dim, self.sizes = dim, sizes

    def read(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return _cut(tensors[0], self.dim, len(self.ours), self.sizes)

    def write(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [_join(tensors, self.dim, self.sizes)]


WeightMap = Sequence[Row]


def _join(tensors: Sequence[torch.Tensor], dim: int, sizes: Sequence[int] | None) -> torch.Tensor:
    found = [tensor.shape[dim] for tensor in tensors]
    if found != (list(sizes) if sizes else found[:1] * len(found)):
        raise ValueError(f"must have {list(sizes) if sizes else 'one size'} along axis {dim}")
    return torch.cat(list(tensors), dim)


def _cut(
    tensor: torch.Tensor, dim: int, parts: int, sizes: Sequence[int] | None
) -> list[torch.Tensor]:
    if sizes is None and tensor.shape[dim] % parts:
        raise ValueError(f"must have a multiple of {parts} along axis {dim}")
    return list(tensor.split(list(sizes) if sizes else tensor.shape[dim] // parts, dim))


@lru_cache(maxsize=4096)
def _compiled(pattern: str) -> re.Pattern:
    text = (
        re.escape(pattern)
        .replace(r"\{\}", r"(?P<layer>0|[1-9][0-9]{0,4})")
        .replace(r"\*", r"(?P<rest>.+)")
    )
    return re.compile(text, re.DOTALL)


def _bind(pattern: str, name: str, index: Mapping[int, int] | None = None) -> Binding | None:
    found = _compiled(pattern).fullmatch(name)
    if found is None:
        return None
    groups = found.groupdict()
    layer = None if groups.get("layer") is None else int(groups["layer"])
    if index is not None:
        if layer not in index:
            return None
        layer = index[layer]
    return layer, groups.get("rest")


def _fill(pattern: str, binding: Binding) -> str:
    layer, rest = binding
    return pattern.replace("{}", str(layer)).replace("*", rest or "")


@dataclass
class Move:
    """Tensors of a file that form tensors of the model.

    Attributes:
        row: the row that converts them.
        ours: the model's names.
        theirs: the file's names; None for a tensor that was not found.
        written: the names that would be written, for errors.
    """

    row: Row
    ours: list[str]
    theirs: list[str | None]
    written: list[str]


def plan_moves(
    weight_map: WeightMap, names: Iterable[str]
) -> tuple[list[Move], list[str], list[str]]:
    """Match a file's tensors with the model's.

    Args:
        weight_map: the map between them.
        names: the file's names.

    Returns:
        The moves, in the order of the names; the names that no row matches; and "one and other"
        for two names of the same tensor.
    """
    moves: dict[tuple[Row, Binding], Move] = {}
    unknown, twice = [], []
    for name in names:
        for row in weight_map:
            if (found := row.find(name)) is not None:
                break
        else:
            unknown.append(name)
            continue
        if not row.ours:  # dropped
            continue
        binding, place = found
        if (row, binding) not in moves:
            written = row.file_names(binding)
            moves[row, binding] = Move(row, row.our_names(binding), [None] * len(written), written)
        move = moves[row, binding]
        if move.theirs[place] is None:
            move.theirs[place] = name
        else:
            twice.append(f"{move.theirs[place]} and {name}")
    return list(moves.values()), unknown, twice


def file_names(weight_map: WeightMap, name: str) -> list[str]:
    """The names of the file's tensors that contain one of the model's.

    Raises:
        ValueError: no row matches.
    """
    row, binding, _ = _writer(weight_map, name)
    return row.file_names(binding)


def to_file(weight_map: WeightMap, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Convert the model's tensors to the file's.

    Raises:
        ValueError: no row matches a tensor, or other tensors that form the same tensor of the file
            are missing.
    """
    groups: dict[tuple[Row, Binding], list[torch.Tensor | None]] = {}
    for name, tensor in tensors.items():
        row, binding, place = _writer(weight_map, name)
        groups.setdefault((row, binding), [None] * len(row.ours))[place] = tensor
    written = {}
    for (row, binding), group in groups.items():
        if absent := [
            name
            for name, tensor in zip(row.our_names(binding), group, strict=True)
            if tensor is None
        ]:
            raise ValueError(
                f"{', '.join(row.file_names(binding))} cannot be written without "
                f"{', '.join(absent)}"
            )
        written |= zip(row.file_names(binding), row.write(group), strict=True)
    return written


def _writer(weight_map: WeightMap, name: str) -> tuple[Row, Binding, int]:
    for row in weight_map:
        if (found := row.find_ours(name)) is not None:
            return row, *found
    raise ValueError(f"no place in the file format for the model's tensor {name!r}")
