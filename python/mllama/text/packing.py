"""Packed rows: several sequences per row, marked by restarting positions or flash attention's
arguments.
"""

import torch
from torch.nn.functional import pad

from mllama.nn.checks import check_integers


def go_back(position_ids: torch.Tensor | None) -> bool:
    """Whether positions decrease within a row, as in packed rows. While compiling: whether
    positions are given.
    """
    if not isinstance(position_ids, torch.Tensor) or position_ids.dim() != 2:
        return False  # rejected where they are used
    if not _readable(position_ids):
        return True
    return bool((position_ids.long().diff() < 0).any())  # unsigned differences wrap


def find_starts(position_ids: torch.Tensor) -> torch.Tensor | None:
    """Start of each position's sequence: int64 [B or 1, T].

    As in transformers, a position that is not its predecessor plus one begins a sequence. None if
    every row is one sequence; never None while compiling, when values cannot be read.

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
    """`find_starts` from the arguments of transformers' DataCollatorWithFlattening; None if none is
    given.

    Args:
        shape: (B, T).
        cu_seq_lens_q: int [sequences + 1], each start in the concatenated rows, and B * T.
        cu_seq_lens_k: as cu_seq_lens_q, with the same values.
        max_length_q, max_length_k: length of the longest sequence or more; with cu_seq_lens_q.
        seq_idx: int [B or 1, T], changing from one sequence to the next.

    Raises:
        TypeError: a value is not an integer tensor, or not an int.
        ValueError: values do not fit the rows or each other.
    """
    found: dict[str, torch.Tensor] = {}
    for name, lengths in (("cu_seq_lens_q", cu_seq_lens_q), ("cu_seq_lens_k", cu_seq_lens_k)):
        if lengths is not None:
            found[name] = _from_lengths(name, lengths, shape)
    for name, longest in (("max_length_q", max_length_q), ("max_length_k", max_length_k)):
        if longest is not None:
            _check_longest(name, longest, cu_seq_lens_q)
    if seq_idx is not None:
        check_integers("seq_idx", seq_idx)
        if list(seq_idx.shape) not in ([1, shape[1]], list(shape)):
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
    """Sequences in a call's rows: (position_ids, start of each position's sequence or None).

    Args:
        shape: (B, T).
        position_ids: the call's. Default: derived from `described`.
        obstacle: name of an argument that excludes packing, if the call has one: restarting
            positions are not interpreted with it.
        described: arguments of `given_starts`.

    Raises:
        TypeError: as `given_starts`.
        ValueError: as `given_starts`; or arguments that contradict position_ids or come with an
            obstacle.
    """
    name = next((name for name, value in described.items() if value is not None), None)
    if name is not None and obstacle is not None:
        raise ValueError(f"{name} describes packed rows, which do not support {obstacle}")
    if obstacle is not None:
        return position_ids, None
    fitting = isinstance(position_ids, torch.Tensor) and tuple(position_ids.shape) in (
        tuple(shape),
        (1, shape[1]),
    )
    # Positions of another shape are rejected where they are used.
    found = find_starts(position_ids) if fitting else None
    if name is None:
        return position_ids, found
    starts = given_starts(shape, **described)
    if position_ids is None:
        position_ids = positions_within(starts)
    elif fitting:
        check_same_starts(name, starts, "position_ids", found)
    return position_ids, starts if not _readable(starts) or starts.any() else None


def check_same_starts(
    name: str, starts: torch.Tensor | None, other_name: str, other: torch.Tensor | None
) -> None:
    """Raise ValueError unless two arguments begin sequences at the same positions; None means one
    sequence per row.
    """
    if not all(_readable(tensor) for tensor in (starts, other) if tensor is not None):
        return
    one = torch.zeros((1, 1), dtype=torch.long, device="cpu")
    pair = [one if tensor is None else tensor.cpu() for tensor in (starts, other)]
    if not torch.equal(*torch.broadcast_tensors(*pair)):
        begin, other_begin = (tensor[0].unique().tolist() for tensor in pair)
        raise ValueError(
            f"{name} must begin sequences where {other_name} does: at {other_begin} of the first "
            f"row, got {begin}"
        )


def positions_within(starts: torch.Tensor) -> torch.Tensor:
    """[B or 1, T]: each position's index within its sequence."""
    return torch.arange(starts.shape[1], device=starts.device) - starts


def ends_of(starts: torch.Tensor) -> torch.Tensor:
    """End (exclusive) of each position's sequence, shaped as `starts`."""
    begins = positions_within(starts) == 0
    return next_place(pad(begins[:, 1:], (0, 1)), after=1)


def next_place(marks: torch.Tensor, after: int = 0) -> torch.Tensor:
    """bool [B, T] -> int64 [B, T]: `after` plus the first marked index at or after each index, T if
    there is none.
    """
    length = marks.shape[1]
    places = (torch.arange(length, device=marks.device) + after).masked_fill(~marks, length)
    return places.flip(1).cummin(1).values.flip(1)


def _readable(tensor: torch.Tensor) -> bool:
    """Whether values can be read: not while compiling, and not on the meta device."""
    return not (torch.compiler.is_compiling() or tensor.is_meta)


def _starts(new: torch.Tensor) -> torch.Tensor:
    """bool [B, T - 1], whether each position after the first begins a sequence -> starts."""
    new = pad(new, (1, 0))
    return (torch.arange(new.shape[1], device=new.device) * new).cummax(1).values


def _from_lengths(name: str, lengths: torch.Tensor, shape: tuple[int, int]) -> torch.Tensor:
    check_integers(name, lengths)
    if lengths.dim() != 1 or len(lengths) < 2:
        raise ValueError(f"{name} must be [sequences + 1], got {list(lengths.shape)}")
    rows, length = shape
    lengths = lengths.long()
    if _readable(lengths) and (
        lengths[0] != 0 or lengths[-1] != rows * length or (lengths.diff() < 0).any()
    ):
        raise ValueError(
            f"{name} must increase from 0 to the number of tokens, {rows * length}, "
            f"got {lengths.tolist()}"
        )
    places = torch.arange(rows * length, device=lengths.device)
    starts = (
        lengths[torch.searchsorted(lengths, places, right=True) - 1].view(rows, length)
        - places.view(rows, length)[:, :1]
    )
    if _readable(starts) and (starts < 0).any():
        raise ValueError(
            f"{name} must begin a sequence with every row of {length} tokens, "
            f"got {lengths.tolist()}"
        )
    return starts


def _check_longest(name: str, longest: int | torch.Tensor, lengths: torch.Tensor | None) -> None:
    if isinstance(longest, bool) or not isinstance(longest, (int, torch.Tensor)):
        raise TypeError(f"{name} must be an int, got {type(longest).__name__}")
    if lengths is None:
        raise ValueError(f"{name} needs cu_seq_lens_q")
    if _readable(lengths) and longest < (real := int(lengths.diff().max())):
        raise ValueError(
            f"{name} must be at least the longest sequence of cu_seq_lens_q, {real}, "
            f"got {int(longest)}"
        )
