"""Names of parameters and modules in transformers' own classes in memory, as adapters use them."""

import re
from collections.abc import Iterable

from mllama.weights.rows import WeightMap, plan_moves

Prefixes = tuple[tuple[str, str], ...]  # (ours, transformers'); the first match applies


def stock_name(prefixes: Prefixes, name: str) -> str:
    """Our dotted name as in transformers' class of the model; unchanged if no prefix matches."""
    for ours, theirs in prefixes:
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def stock_patterns(prefixes: Prefixes) -> dict[str, str]:
    """Regular expressions of transformers' names and their replacements, as PEFT applies them."""
    # If two have the same name, the first applies.
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
