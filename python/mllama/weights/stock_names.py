"""The names that parameters and modules have in transformers' own classes, in memory: what adapters
are known by.
"""

import re

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
