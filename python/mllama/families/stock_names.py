"""The names that parameters and modules have in transformers' own classes, in memory, by family:
what adapters are known by.
"""

import re

from transformers import PretrainedConfig

from mllama.families import siglip_llama

# (ours, transformers'), the first that a name begins with. What is not here has one name.
_LLAMA = (("language_model", "model"),)
_LLAVA = tuple(
    (part, f"model.{part}") for part in ("vision_tower", "multi_modal_projector", "language_model")
)
_MLLAMA = (
    ("vision_tower", "model.vision_model"),
    ("multi_modal_projector.linear", "model.multi_modal_projector"),
    ("multi_modal_projector", "model.multi_modal_projector"),
    ("language_model", "model.language_model"),
)
_PREFIXES = {
    "llama": _LLAMA,
    "gemma": _LLAMA,
    "gemma2": _LLAMA,
    "gemma3_text": _LLAMA,
    "llava": _LLAVA,
    "paligemma": _LLAVA,
    "mllama": _MLLAMA,
}


def stock_name(config: PretrainedConfig, name: str) -> str:
    """A dotted name of ours as transformers' class of that model has it; the same where there is
    none.
    """
    for ours, theirs in _prefixes(config):
        if name == ours or name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    return name


def stock_patterns(config: PretrainedConfig) -> dict[str, str]:
    """Regular expressions of transformers' names and what takes their place in ours, as PEFT
    applies them.
    """
    prefixes = {
        theirs: ours for ours, theirs in reversed(_prefixes(config))
    }  # of two that have one name the first
    return {rf"^{re.escape(theirs)}\.": f"{ours}." for theirs, ours in prefixes.items()}


def _prefixes(config: PretrainedConfig) -> tuple[tuple[str, str], ...]:
    return _PREFIXES.get(siglip_llama.written_as(config).model_type, ())
