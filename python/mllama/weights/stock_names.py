"""The names that parameters and modules have in transformers' own classes, in memory: what adapters
are known by.
"""

import re
from collections.abc import Iterable

from mllama.weights.rows import WeightMap, plan_moves

Prefixes = tuple[tuple[str, str], ...]  # (ours, transformers'), the first that fits a name


def stock_name(prefixes: Prefixes, name: str) -> str:
    """A dotted name of ours as transformers' class of that model has it; the same where there is
    none.
    """
    for ours, theirs in prefixes:
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def stock_patterns(prefixes: Prefixes) -> dict[str, str]:
    """Regular expressions of transformers' names and what takes their place in ours, as PEFT
    applies them.
    """
    # Of two that have one name the first.
    names = {theirs: ours for ours, theirs in reversed(prefixes)}
    return {rf"^{re.escape(theirs)}\.": f"{ours}." for theirs, ours in names.items()}


def own_names(weight_map: WeightMap, names: Iterable[str]) -> dict[str, str]:
    """Our names of tensors by those that files have, or transformers' classes in memory. Names that
    no row knows are left out, and what is put together of several tensors.
    """
    moves, _, _ = plan_moves(weight_map, names)
    single = [move for move in moves if len(move.theirs) == len(move.ours) == 1]
    return {
        theirs: ours
        for move in single
        for theirs, ours in zip(move.theirs, move.ours, strict=True)
        if theirs is not None
    }
