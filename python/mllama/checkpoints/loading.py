"""Loads a source's tensors into a model: first both are matched by their headers, then tensors are
read one at a time.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate

import torch

from mllama.checkpoints.files import listing_by_kind
from mllama.checkpoints.sources import Header, Source, Taker
from mllama.device import in_range
from mllama.weights.rows import Move, WeightMap, file_names, plan_moves

# Dtypes that tensors are loaded in: the operators do not support float64.
_LOADED_AS = {
    torch.float64: torch.float32,
    torch.float32: torch.float32,
    torch.float16: torch.float16,
    torch.bfloat16: torch.bfloat16,
}


@dataclass
class Report:
    """Result of matching checkpoint tensors with model parameters.

    Attributes:
        moves: the tensors to load.
        dtype: dtype of most of the loaded elements.
        missing: file names of tensors that the model needs and the source lacks.
        unexpected: names in the source without a counterpart in the model.
        unfit: tensors with a wrong shape or dtype, each with both.
        twice: several names of the same tensor.
        lacking: the model's own names of tensors that are not loaded.
    """

    moves: list[Move] = field(default_factory=list)
    dtype: torch.dtype = torch.float32
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    unfit: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    lacking: list[str] = field(default_factory=list)

    def problems(self) -> str:
        """All non-empty lists as a text, for an error; "" if everything matches."""
        kinds = {
            "missing": self.missing,
            "unexpected": self.unexpected,
            "of another shape or kind": self.unfit,
            "given twice": self.twice,
        }
        return listing_by_kind(kinds)

    def check(self, where: str) -> None:
        """Raise if the files do not fit.

        Raises:
            ValueError: a list is not empty; the message has all of them.
        """
        if problems := self.problems():
            raise ValueError(f"the weights in {where} do not fit the model. Tensors {problems}")


def match(
    wanted: dict[str, torch.Tensor],
    headers: dict[str, Header],
    weight_map: WeightMap,
    tied: dict[str, str] | None = None,
) -> Report:
    """Match a file's tensors with a model's, from headers alone.

    Args:
        wanted: the model's state dict, possibly on the meta device: names and shapes.
        headers: the file's tensors.
        weight_map: the map between the two.
        tied: {model name: name of the tensor it is tied to}. The file may leave out either.
    """
    tied = tied or {}
    report = Report()
    moves, report.unexpected, report.twice = plan_moves(weight_map, headers)
    homes: dict[str, str] = {}
    elements = dict.fromkeys(_LOADED_AS.values(), 0)
    for move in moves:
        if None in move.theirs:
            report.missing += [
                written
                for written, name in zip(move.written, move.theirs, strict=True)
                if name is None
            ]
            homes |= dict.fromkeys(move.ours, "")
        elif not all(name in wanted for name in move.ours):
            report.unexpected += move.theirs
        elif again := [name for name in move.ours if name in homes]:
            report.twice.append(f"{homes[again[0]]} and {move.theirs[0]}")
        else:
            homes |= dict.fromkeys(move.ours, move.theirs[0])
            if fault := _fault(move, headers, wanted):
                report.unfit.append(fault)
            else:
                report.moves.append(move)
                for name in move.theirs:
                    if headers[name].dtype in _LOADED_AS:
                        count = torch.Size(headers[name].shape).numel()
                        elements[_LOADED_AS[headers[name].dtype]] += count
    loaded, twins = {name for move in report.moves for name in move.ours}, both_ways(tied)
    report.lacking = [
        name for name in wanted if name not in loaded and twins.get(name) not in loaded
    ]
    for name in report.lacking:
        if name not in homes and name not in tied:
            report.missing += [
                written for written in file_names(weight_map, name) if written not in report.missing
            ]
    report.unexpected.sort()
    report.dtype = max(elements, key=elements.get)
    return report


def both_ways(tied: dict[str, str]) -> dict[str, str]:
    """Pairs of tied names, in both directions."""
    return {other: name for name, other in tied.items()} | tied


def _fault(move: Move, headers: dict[str, Header], wanted: dict[str, torch.Tensor]) -> str:
    """How the file's tensors of a move differ from the model's; "" if they do not."""
    given = [headers[name] for name in move.theirs]
    kinds = [f"{str(header.dtype).removeprefix('torch.')} {list(header.shape)}" for header in given]
    problem = " and ".join(
        f"{name} is {kind}" for name, kind in zip(move.theirs, kinds, strict=True)
    )
    in_bytes = any(wanted[name].dtype == torch.uint8 for name in move.ours)  # packed weights
    shapes = " and ".join(str(list(wanted[name].shape)) for name in move.ours)
    taken = f"{'uint8' if in_bytes else 'floating'} {shapes}"
    known = (torch.uint8,) if in_bytes else _LOADED_AS
    try:
        values = move.row.read(
            [torch.empty(header.shape, dtype=header.dtype, device="meta") for header in given]
        )
    except (RuntimeError, ValueError, IndexError, ZeroDivisionError) as error:
        return f"{problem}, the model takes {taken}: {' '.join(str(error).split())}"
    fits = [
        value.shape == wanted[name].shape for value, name in zip(values, move.ours, strict=True)
    ]
    if all(fits) and all(header.dtype in known for header in given):
        return ""
    return f"{problem}, the model takes {taken}"


def load_weights(
    model: torch.nn.Module,
    source: Source,
    weight_map: WeightMap,
    dtype: torch.dtype | None = None,
    device_of: Callable[[str], torch.device | str] = lambda name: "cpu",
    tied: dict[str, str] | None = None,
    strict: bool = True,
    take: Taker | None = None,
    mapped: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Load a source's tensors as the model's parameters, which may be on the meta device. Weights
    are in memory once.

    Args:
        model: the model; its state dict gives names and shapes.
        source: the tensors.
        weight_map: map between the source's names and the model's.
        dtype: dtype of the loaded tensors. Default: the dtype of most of the source's elements.
        device_of: device of each of the model's tensors, by name.
        tied: as in `match`. If a file has both, they must be equal.
        strict: False loads what fits and leaves the rest unchanged.
        take: called for each of the model's tensors; True says that it has put it into the model
            in its own way.
        mapped: keep views of the source's mapped files where dtype and device allow it: the memory
            is the files' pages, and the model must not outlive them or be changed.
        progress: called before the first tensor and after each one, with the number of elements
            loaded and their total.

    Returns:
        The report of what was loaded and what was not.

    Raises:
        ValueError: with `strict`, a tensor is missing, unexpected, repeated, or has a wrong shape
            or dtype (one error lists all); tied tensors differ; or `take` refuses a tensor. In any
            case, a tensor has values beyond float16's range, and dtype is float16.
    """
    tied = tied or {}
    headers = source.headers()
    report = match(model.state_dict(), headers, weight_map, tied)
    if strict:
        report.check(source.where)
    dtype = dtype or report.dtype
    loaded: dict[str, torch.Tensor] = {}
    # Tied tensors last: they are only compared, and never in memory next to their counterpart.
    moves = sorted(report.moves, key=lambda move: move.ours[0] in tied)
    for move in moves if progress is None else _counted(moves, headers, progress):
        tensors = _Tensors(source, move)
        for place, name in enumerate(move.ours):
            other = loaded.get(tied.get(name))
            if other is None:
                if take is not None and tensors.taken(take, place, headers, dtype):
                    continue
                given = tensors.given if source.mapped else []
                value = tensors.read(place)
                loaded[name] = _placed(value, given, device_of(name), dtype, mapped)
                if value.dtype != torch.float16:
                    where = f"{source.where}: {move.theirs[0]}"
                    in_range(where, value, loaded[name])
            elif not torch.equal(other.cpu(), tensors.read(place).to(dtype)):
                both = f"{move.theirs[0]} and {', '.join(file_names(weight_map, tied[name]))}"
                problem = f"{both} differ, but the config says they are one (tied)"
                if strict:
                    raise ValueError(f"{source.where}: {problem}")
                report.moves.remove(move)
                report.unfit.append(problem)
    for name, other in both_ways(tied).items():
        if name not in loaded and other in loaded:
            loaded[name] = loaded[other]
    if take is not None:
        in_place = model.state_dict()
        loaded |= {name: in_place[name] for name in in_place if not in_place[name].is_meta}
    torch.nn.Module.load_state_dict(model, loaded, strict=strict, assign=True)
    return report


def _counted(
    moves: list[Move], headers: dict[str, Header], progress: Callable[[int, int], None]
) -> Iterator[Move]:
    """The moves; `progress` is told the elements of those that are over."""
    sizes = [sum(torch.Size(headers[name].shape).numel() for name in move.theirs) for move in moves]
    progress(0, sum(sizes))
    for move, done in zip(moves, accumulate(sizes), strict=True):
        yield move
        progress(done, sum(sizes))


class _Tensors:
    """A move's tensors, read when they are needed."""

    def __init__(self, source: Source, move: Move):
        self._source, self._move = source, move

    @cached_property
    def given(self) -> list[torch.Tensor]:
        """The file's."""
        return [self._source.read(name) for name in self._move.theirs]

    @cached_property
    def _values(self) -> list[torch.Tensor]:
        return self._move.row.read(self.given)

    def read(self, place: int, blocks: bool = False) -> torch.Tensor:
        """One of the model's, as a `Reading`. Rows of blocks are permuted as the others are."""
        if not blocks:
            return self._values[place]
        rows = [self._source.read_blocks(name) for name in self._move.theirs]
        return self._move.row.read(rows)[place]

    def taken(
        self, take: Taker, place: int, headers: dict[str, Header], dtype: torch.dtype
    ) -> bool:
        """What `take` says of one of the model's tensors."""
        name = self._move.theirs[0]
        try:
            return take(self._move.ours[place], partial(self.read, place), headers[name], dtype)
        except ValueError as error:
            raise ValueError(f"{self._source.where}: {name}: {error}") from error


def _placed(
    value: torch.Tensor,
    mapped: list[torch.Tensor],
    device: torch.device | str,
    dtype: torch.dtype,
    keep: bool,
) -> torch.Tensor:
    """Copy the value to its device, into memory of its own: mapped pages would change or vanish
    with the file. `keep` accepts that.
    """
    placed = value.to(device=device, dtype=dtype).contiguous()
    if keep:
        return placed
    memory = placed.untyped_storage()
    shared = memory.nbytes() != placed.nbytes or any(
        memory.data_ptr() == given.untyped_storage().data_ptr() for given in mapped
    )
    return placed.clone() if shared else placed


def common_dtype(tensors: dict[str, torch.Tensor], default: torch.dtype) -> torch.dtype:
    """The floating dtype of most of the tensors' elements: the default of `load_weights`."""
    elements: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        if tensor.is_floating_point():
            elements[tensor.dtype] = elements.get(tensor.dtype, 0) + tensor.numel()
    return max(elements, key=elements.get, default=default)


def check_plain(names: Iterable[str]) -> None:
    """Reject the state dict of a model with LoRA layers, which has no names in any format.

    Raises:
        ValueError: there are LoRA layers; the message says what to call instead.
    """
    if any(".lora_a." in name for name in names):
        raise ValueError(
            "this model has LoRA layers, which have no names in its format: "
            "mllama.save_lora(model, file) writes the adapters alone;"
            " mllama.merge_and_unload(model) adds them to the weights for good, and the model can "
            "be saved"
        )


def check_complete(given: Iterable[str], needed: Iterable[str], known: Iterable[str]) -> None:
    """Reject a state dict that is not the complete model.

    Raises:
        ValueError: names are missing or unknown; the message lists them.
    """
    kinds = {
        "lacks": sorted(set(needed) - set(given)),
        "has, unknown to the model,": sorted(set(given) - set(known)),
    }
    if found := listing_by_kind(kinds):
        raise ValueError(f"state_dict is not this model's: it {found}")
