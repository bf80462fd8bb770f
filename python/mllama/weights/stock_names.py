"""Names of parameters and modules in transformers' own classes in memory, as adapters use them."""

import re

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
