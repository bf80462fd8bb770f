"""Weight maps between the tensors of a file and a model's: rows that rename, drop, concatenate,
split and reshape, each one invertible.

A weight map is a list of rows, one per group of tensors. It is read from top to bottom, and the
first row that knows a name decides. In a name's pattern `{}` stands for a layer's number and `*`
for any rest, the same on both sides. "Ours" is the model's side, "theirs" the file's.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import torch

Binding = tuple[int | None, str | None]  # what `{}` and `*` of a pattern stand for


class Step(Protocol):
    """A change of a tensor's values or shape on its way from the file to the model, and back."""

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """The file's tensor as the model has it. Raises RuntimeError or ValueError for a shape that
        it cannot be.
        """

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """The model's tensor as the file has it."""


@dataclass(frozen=True)
class Permute:
    """Rotary pairs <-> halves: files of Meta and GGUF rotate neighbours (2i, 2i + 1) of a head, the
    model (i, i + d/2).

    Attributes:
        heads: along the first axis: query heads for q_proj, key-value heads for k_proj.
    """

    heads: int

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """[heads * d, ...] of neighbours -> of halves."""
        return (
            tensor.reshape(self.heads, -1, 2, *tensor.shape[1:])
            .transpose(1, 2)
            .reshape(tensor.shape)
        )

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """[heads * d, ...] of halves -> of neighbours."""
        return (
            tensor.reshape(self.heads, 2, -1, *tensor.shape[1:])
            .transpose(1, 2)
            .reshape(tensor.shape)
        )


@dataclass(frozen=True)
class Reshape:
    """The same values under another shape.

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
    """A constant between the two: ours = theirs + amount."""

    amount: float

    def read(self, tensor: torch.Tensor) -> torch.Tensor:
        """Theirs + amount, in the tensor's type."""
        return tensor + self.amount

    def write(self, tensor: torch.Tensor) -> torch.Tensor:
        """Ours - amount, in the tensor's type."""
        return tensor - self.amount


def _of_shape(tensor: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"must be {list(shape)}")
    return tensor


class Row:
    """One group of tensors: some of ours are made of some of theirs.

    Attributes:
        ours: patterns of the model's names.
        theirs: patterns of the file's names, as they are written.
        spellings: `theirs`, and further sets of names that files are known to have; those are read,
            never written.
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
            ours, theirs, also: as the attributes.
            index: a file's layer number -> the model's; where given, other layers are not this
                row's.
        """
        self.ours, self.theirs, self.spellings = (
            tuple(ours),
            tuple(theirs),
            (tuple(theirs), *map(tuple, also)),
        )
        self._ours_of = index
        self._theirs_of = None if index is None else {mine: layer for layer, mine in index.items()}

    def find(self, name: str) -> tuple[Binding, int] | None:
        """What a file's name stands for here: the binding on our side and its place in `theirs`;
        None where this row does not know it.
        """
        for spelling in self.spellings:
            for place, pattern in enumerate(spelling):
                if (binding := _bind(pattern, name, self._ours_of)) is not None:
                    return binding, place
        return None

    def find_ours(self, name: str) -> tuple[Binding, int] | None:
        """The same of one of the model's names: its binding and its place in `ours`."""
        for place, pattern in enumerate(self.ours):
            binding = _bind(pattern, name)
            if binding is not None and (self._theirs_of is None or binding[0] in self._theirs_of):
                return binding, place
        return None

    def our_names(self, binding: Binding) -> list[str]:
        """The model's names of a binding."""
        return [_fill(pattern, binding) for pattern in self.ours]

    def file_names(self, binding: Binding) -> list[str]:
        """The file's names of a binding, as written."""
        layer, rest = binding
        return [
            _fill(pattern, (layer if self._theirs_of is None else self._theirs_of[layer], rest))
            for pattern in self.theirs
        ]

    def read(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Theirs -> ours. Raises RuntimeError or ValueError for shapes that they cannot be."""
        raise NotImplementedError

    def write(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Ours -> theirs."""
        raise NotImplementedError


class Rename(Row):
    """Tensors that change their names, and their values by the steps given."""

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
    """Tensors of files that the model has no use for: read past, never written."""

    def __init__(self, theirs: str):
        super().__init__((), (theirs,))

    def read(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return []


class Concat(Row):
    """Several tensors of the file are one of the model's, one after the other along an axis."""

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
            sizes: of the parts along it; None: all of one size.
        """
        super().__init__((ours,), theirs, also, index)
        self.dim, self.sizes = dim, sizes

    def read(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [_join(tensors, self.dim, self.sizes)]

    def write(self, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return _cut(tensors[0], self.dim, len(self.theirs), self.sizes)


class Split(Row):
    """One tensor of the file is several of the model's, cut along an axis."""

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
    """Some tensors of a file that make some of the model's.

    Attributes:
        row: how.
        ours: the model's names.
        theirs: the file's names, None for one that has not been found.
        written: the names they would be written under, for errors.
    """

    row: Row
    ours: list[str]
    theirs: list[str | None]
    written: list[str]


def plan_moves(
    weight_map: WeightMap, names: Iterable[str]
) -> tuple[list[Move], list[str], list[str]]:
    """How a file's tensors become the model's.

    Args:
        weight_map: between them.
        names: the file's.

    Returns:
        The moves, in the order of the names; the names that no row knows; and "one and other" for
        names of one and the same tensor.
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
    """The names of the file's tensors that hold one of the model's.

    Raises:
        ValueError: no row knows it.
    """
    row, binding, _ = _writer(weight_map, name)
    return row.file_names(binding)


def to_file(weight_map: WeightMap, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The model's tensors as the file has them.

    Raises:
        ValueError: a tensor that no row knows, or one without the others that go into the same
            tensor of the file.
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
