"""Packed rows: several sequences in one row, told by positions that restart or by what flash
attention's callers give.
"""

import torch
from torch.nn.functional import pad


def go_back(position_ids: torch.Tensor | None) -> bool:
    """Whether positions fall somewhere in a row: it is packed, whatever else may be. While
    compiling, whether there are any.
    """
    if (
        not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2
    ):  # refused where they are used
        return False
    return not _readable(position_ids) or bool(
        (position_ids.long().diff() < 0).any()
    )  # unsigned differences wrap


def find_starts(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Where the sequence of each position begins: int64 [B or 1, T].

    As in transformers, a position that is not one more than the position before it begins a
    sequence. None where every row holds one sequence; while compiling, when values cannot be read,
    never None.

    Args:
        position_ids: int [B or 1, T].
    """
    new = position_ids.long().diff() != 1
    if _readable(new) and not new.any():
        return None
    return _starts(new)


def given_starts(
    shape: tuple[int, int],
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    seq_idx: torch.Tensor | None = None,
) -> torch.Tensor | None:
    """The same from the arguments of transformers' DataCollatorWithFlattening; None where none of
    them is given.

    Args:
        shape: (B, T).
        cu_seq_lens_q: int [sequences + 1], where each begins in the rows laid end to end, and at
            last their length, B * T.
        cu_seq_lens_k: as cu_seq_lens_q, with the same values.
        max_length_q, max_length_k: the longest sequence's length, or more; with cu_seq_lens_q.
        seq_idx: int [B or 1, T], changing from sequence to sequence.

    Raises:
        TypeError: no tensor of integers, or no int.
        ValueError: values that do not fit the rows or each other.
    """
    found = {}
    for name, lengths in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if lengths is not None:
            found[name] = _from_lengths(name, lengths, shape)
    for name, longest in (("max_length_q", max_length_q), ("max_length_k", max_length_k)):
        if longest is not None:
            _check_longest(name, longest, cu_seq_lens_q)
    if seq_idx is not None:
        _check_integers("seq_idx", seq_idx)
        if (
            seq_idx.dim() != 2
            or seq_idx.shape[0] not in (1, shape[0])
            or seq_idx.shape[1] != shape[1]
        ):
            raise ValueError(
                f"seq_idx must be [{shape[0]} or 1, {shape[1]}], got {list(seq_idx.shape)}"
            )
        found["seq_idx"] = _starts(seq_idx.diff() != 0)
    starts = None
    for name, other in found.items():
        starts = other if starts is None else starts
        check_same_starts(name, other, next(iter(found)), starts)
    return starts


def find_sequences(
    shape: tuple[int, int], position_ids: torch.Tensor | None, obstacle: str | None, **described
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What a call says of several sequences in its rows: (position_ids, where the sequence of each
    position begins or None).

    Args:
        shape: (B, T).
        position_ids: as the call has them; None is made of what else describes the rows, if
            anything does.
        obstacle: an argument beside which rows are not packed, if the call has one: then positions
            that restart say nothing.
        described: arguments of `given_starts`.

    Raises:
        TypeError: as `given_starts`.
        ValueError: as `given_starts`; arguments that disagree with position_ids, or come with an
            obstacle.
    """
    name = next((name for name, value in described.items() if value is not None), None)
    if name is not None and obstacle is not None:
        raise ValueError(f"{name} describes packed rows, which take no {obstacle}")
    if obstacle is not None:
        return position_ids, None
    fitting = isinstance(position_ids, torch.Tensor) and tuple(position_ids.shape) in (
        tuple(shape),
        (1, shape[1]),
    )
    told = find_starts(position_ids) if fitting else None  # others are refused where they are used
    if name is None:
        return position_ids, told
    starts = given_starts(shape, **described)
    if position_ids is None:
        position_ids = positions_within(starts)
    elif fitting:
        check_same_starts(name, starts, "position_ids", told)
    return position_ids, starts if not _readable(starts) or starts.any() else None


def check_same_starts(
    name: str, starts: torch.Tensor | None, other_name: str, other: torch.Tensor | None
) -> None:
    """Raise ValueError unless two arguments begin sequences at the same places; None is one
    sequence in each row.
    """
    if not all(_readable(tensor) for tensor in (starts, other) if tensor is not None):
        return
    one = torch.zeros((1, 1), dtype=torch.long, device="cpu")
    pair = [one if tensor is None else tensor.cpu() for tensor in (starts, other)]
    if not torch.equal(*torch.broadcast_tensors(*pair)):
        begin, other_begin = (tensor[0].unique().tolist() for tensor in pair)
        raise ValueError(
            f"{name} must begin sequences where {other_name} does: at {other_begin} of the first row, got {begin}"
        )


def positions_within(starts: torch.Tensor) -> torch.Tensor:
    """[B or 1, T]: each position's place in its sequence."""
    return torch.arange(starts.shape[1], device=starts.device) - starts


def ends_of(starts: torch.Tensor) -> torch.Tensor:
    """Where the sequence of each position ends, exclusive: as `starts`."""
    begins = positions_within(starts) == 0
    return next_place(pad(begins[:, 1:], (0, 1)), after=1)


def next_place(marks: torch.Tensor, after: int = 0) -> torch.Tensor:
    """bool [B, T] -> int64 [B, T]: `after` plus the first marked place from each place on, or T
    where there is none.
    """
    length = marks.shape[1]
    places = (torch.arange(length, device=marks.device) + after).masked_fill(~marks, length)
    return places.flip(1).cummin(1).values.flip(1)


def _readable(tensor: torch.Tensor) -> bool:
    """Whether values can be looked at: not while compiling, and a meta tensor has none."""
    return not (torch.compiler.is_compiling() or tensor.is_meta)


def _starts(new: torch.Tensor) -> torch.Tensor:
    """bool [B, T - 1], where a position is the first of a sequence, the row's first left out ->
    where each one's sequence begins.
    """
    new = pad(new, (1, 0))
    return (torch.arange(new.shape[1], device=new.device) * new).cummax(1).values


def _from_lengths(name: str, lengths: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    _check_integers(name, lengths)
    if lengths.dim() != 1 or len(lengths) < 2:
        raise ValueError(f"{name} must be [sequences + 1], got {list(lengths.shape)}")
    rows, length = shape
    lengths = lengths.long()
    if _readable(lengths) and (
        lengths[0] != 0 or lengths[-1] != rows * length or (lengths.diff() < 0).any()
    ):
        raise ValueError(
            f"{name} must rise from 0 to the number of tokens, {rows * length}, got {lengths.tolist()}"
        )
    places = torch.arange(rows * length, device=lengths.device)
    starts = (
        lengths[torch.searchsorted(lengths, places, right=True) - 1].view(rows, length)
        - places.view(rows, length)[:, :1]
    )
    if _readable(starts) and (starts < 0).any():
        raise ValueError(
            f"{name} must begin a sequence with every row of {length} tokens, got {lengths.tolist()}"
        )
    return starts


def _check_longest(name: str, longest: int | torch.Tensor, lengths: torch.Tensor | None) -> None:
    if isinstance(longest, bool) or not isinstance(longest, (int, torch.Tensor)):
        raise TypeError(f"{name} must be an int, got {type(longest).__name__}")
    if lengths is None:
        raise ValueError(f"{name} has a meaning only with cu_seq_lens_q")
    if _readable(lengths) and longest < (real := int(lengths.diff().max())):
        raise ValueError(
            f"{name} must be at least the longest sequence of cu_seq_lens_q, {real}, got {int(longest)}"
        )


def _check_integers(name: str, tensor: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor) or tensor.dtype not in (torch.int32, torch.int64):
        raise TypeError(
            f"{name} must be an int32 or int64 torch.Tensor, got {getattr(tensor, 'dtype', type(tensor).__name__)}"
        )
