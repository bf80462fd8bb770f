"""Which layers an adapter is for: named parts of a model, regular expressions, ends of names."""

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from torch import nn

from mllama.lora.convert import adaptable_layers
from mllama.nn.wrappers import plain_name, unwrapped

_DECODER = r"language_model\.layers\.\d+\."
# Regular expressions that names of linear layers start with, by scope.
SCOPES = {
    "vision": r"vision_tower\.",
    "vision_global": r"vision_tower\.global_transformer\.",
    "projector": r"multi_modal_projector\.",
    "cross_attn": rf"{_DECODER}cross_attn\.",
    "attn": rf"{_DECODER}self_attn\.",
    "mlp": rf"{_DECODER}mlp\.",
    "all-linear": _DECODER,
}
REGEX = "re:"
_RANGE = re.compile(r"(?P<scope>[^\[\]]+)\[(?P<start>-?\d+)?(?P<colon>:)?(?P<stop>-?\d+)?\]")
_NUMBERED = re.compile(r"(?P<stack>.*?\blayers)\.(?P<index>\d+)\.")
# Parts of an encoder that come after the embeddings.
_ENCODED = re.compile(r"vision_tower\.(?:encoder\.layers\.(?P<index>\d+)|post_layernorm|head)\.")


class _Range(NamedTuple):
    """`start:stop` of a stack of layers, as in Python; or the layer `start` alone."""

    start: int | None
    stop: int | None
    one: bool

    def includes(self, index: int, count: int) -> bool:
        if not self.one:
            return index in range(count)[slice(self.start, self.stop)]
        return self.start in (index, index - count)


def find_targets(
    model: nn.Module, targets: str | Iterable[str], ranks: Mapping[str, int] | None = None
) -> dict[str, int | None]:
    """Names of the linear layers that the targets mean, without the parts that wrappers add.

    Args:
        model: a model of any family, or any other module, of which only names and regular
            expressions can be said. Layers that are packed or have adapters count as well.
        targets: one or several of
            - scopes: "vision" (the encoder with all that it contains), "vision_global"
              (Llama-3.2-Vision's global encoder), "projector", "cross_attn", "attn" (the decoder's
              self-attention), "mlp" (the decoder's), "all-linear" (all of the decoder's layers;
              never the encoder, the projector or the output head);
            - a scope's layers: "attn[0:8]", "mlp[-4:]", "cross_attn[3]", by their number in the
              decoder or encoder, as in Python;
            - "re:PATTERN", a regular expression for the full dotted name, anywhere in the model;
            - ends of names, "q_proj", "self_attn.q_proj" or the full name: those of the decoder if
              it has such layers, else of the rest.
            Layers that the model does not compute (`is_read`) are left out.
        ranks: rank by pattern, as PEFT's `rank_pattern`: a regular expression for the end of a
            name. The first that matches counts.

    Returns:
        Name -> rank, None where no pattern matches; in the model's order.

    Raises:
        TypeError: targets are not str, or ranks are no mapping.
        ValueError: there are no targets, or one matches nothing; it is named, with what the model
            has. A regular expression or a range is not valid; a pattern of ranks matches nothing.
    """
    targets = _texts(targets)
    known = [plain_name(model, name) for name in adaptable_layers(model) if name]
    chosen = {name for target in targets for name in _read(model, target, known)}
    return ranked([name for name in known if name in chosen], ranks)


def is_read(model: nn.Module, name: str) -> bool:
    """Whether a model computes with the parameter or layer of this plain name. LLaVA reads the
    features of a layer of its encoder, mostly the last but one: what comes after that layer is not
    computed and gets no gradient.
    """
    layers = getattr(getattr(unwrapped(model), "spec", None), "feature_layers", None)
    found = _ENCODED.match(f"{name}.")
    if layers is None or found is None:
        return True
    return found["index"] is not None and int(found["index"]) < max(layers)


def ranked(
    names: list[str], patterns: Mapping[str, float] | None, what: str = "ranks"
) -> dict[str, Any]:
    """Names with the number of the first pattern that matches their end; `what` they are, for
    errors.
    """
    if not isinstance(patterns, (Mapping, type(None))):
        raise TypeError(f"{what} must be a mapping or None, got {type(patterns).__name__}")
    found: dict[str, Any] = dict.fromkeys(names)
    for pattern, number in reversed([*(patterns or {}).items()]):  # the first one is written last
        expression = _compile(pattern, rf"(?:.*\.)?(?:{pattern})")
        fitting = [name for name in names if expression.fullmatch(name)]
        if not fitting:
            raise ValueError(f"{what}: {pattern!r} matches none of the {len(names)} adapted layers")
        found |= dict.fromkeys(fitting, number)
    return found


def _texts(targets: str | Iterable[str]) -> list[str]:
    if isinstance(targets, Mapping) or not isinstance(targets, Iterable):
        raise TypeError(f"targets must be str, got {type(targets).__name__}")
    texts = [targets] if isinstance(targets, str) else list(targets)
    if not all(isinstance(target, str) for target in texts):
        raise TypeError(f"targets must be str, got {texts!r}")
    if not texts:
        raise ValueError(f"targets is empty: give scopes ({', '.join(SCOPES)}) or names")
    return texts


def _matches(model: nn.Module, target: str, known: list[str]) -> list[str]:
    """Names that one target means."""
    if target.startswith(REGEX):
        expression = _compile(target.removeprefix(REGEX))
        found = [name for name in known if expression.fullmatch(name)]
    elif target in SCOPES:
        found = _in_scope(target, known)
    elif "[" in target:
        found = _in_range(target, known)
    else:
        ended = [name for name in known if f".{name}".endswith(f".{target}")]
        found = _in_scope("all-linear", ended) or ended
    if not found:
        raise ValueError(
            f"targets: {target!r} matches nothing in this {type(model).__name__}; {_choice(known)}"
        )
    return found


def _read(model: nn.Module, target: str, known: list[str]) -> list[str]:
    """Names that one target means, of layers that the model computes."""
    found = _matches(model, target, known)
    read = [name for name in found if is_read(model, name)]
    if not read:
        raise ValueError(
            f"targets: {target!r} has only layers that the model does not compute: the features of "
            "an earlier one are read"
        )
    return read


def _in_scope(scope: str, names: list[str]) -> list[str]:
    return [name for name in names if re.match(SCOPES[scope], name)]


def _in_range(target: str, known: list[str]) -> list[str]:
    found = _RANGE.fullmatch(target)
    if not found or found["scope"] not in SCOPES or not (found["start"] or found["colon"]):
        raise ValueError(
            f"targets: {target!r} is no range of a scope's layers, such as attn[0:8]; scopes are "
            f"{', '.join(SCOPES)}"
        )
    start, stop = (None if text is None else int(text) for text in found.group("start", "stop"))
    wanted = _Range(start, stop, not found["colon"])
    layers = [
        (name, numbered["stack"], int(numbered["index"]))
        for name in known
        if (numbered := _NUMBERED.match(name))
    ]
    counts: dict[str, int] = {}
    for _, stack, index in layers:
        counts[stack] = max(counts.get(stack, 0), index + 1)
    inside = set(_in_scope(found["scope"], known))
    chosen = [
        name
        for name, stack, index in layers
        if name in inside and wanted.includes(index, counts[stack])
    ]
    if inside and not chosen:
        there = sorted({index for name, _, index in layers if name in inside})
        raise ValueError(
            f"targets: {target!r} has no layers; those of {found['scope']} are "
            f"{', '.join(map(str, there)) or 'not numbered'}"
        )
    return chosen


def _compile(pattern: str, expression: str | None = None) -> re.Pattern:
    """A pattern, or an expression made of it, or ValueError that names the pattern."""
    try:
        return re.compile(pattern if expression is None else expression)
    except re.error as error:
        raise ValueError(f"{pattern!r} is no regular expression: {error}") from error


def _choice(known: list[str]) -> str:
    """What a model has, for errors."""
    scopes = [scope for scope in SCOPES if _in_scope(scope, known)]
    ends = sorted({name.rpartition(".")[2] for name in known})
    layers = f"its linear layers are called {', '.join(ends)}" if ends else "no linear layers"
    return f"it has {', '.join(scopes) or 'no scopes'}; {layers}"
