"""Kinds of values that a key of a run's settings takes, in YAML and as a flag."""

import argparse
import dataclasses
import math
from collections.abc import Callable
from typing import Any

_LONGEST = 60  # characters of a value that an error shows


@dataclasses.dataclass(frozen=True)
class Kind:
    """What a key accepts.

    Attributes:
        what: names the accepted values, after "must be".
        check: turns a value of YAML or the text of a flag into the key's, or raises ValueError.
        metavar: shown in the help of the flag.
        many: None for one value, else how a flag's texts become one value.
    """

    what: str
    check: Callable[[Any], Any]
    metavar: str
    many: Callable[[list[str]], Any] | None = None


def number(
    kind: type, least: float, most: float = math.inf, above: bool = False, below: bool = False
) -> Kind:
    """An int or float of at least `least` (above it) and at most `most` (below it)."""
    upper = "" if most == math.inf else f" and {'below' if below else 'at most'} {most}"
    what = f"a {'whole ' * (kind is int)}number {'above' if above else 'of at least'} {least}"

    def check(value: Any) -> Any:
        # YAML reads 2e-4 as a text: its numbers need a point
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise ValueError
        # bounded before it is converted: huge ints are no floats
        if isinstance(value, str) and len(value) > _LONGEST:
            raise ValueError
        if kind is int and isinstance(value, float):
            raise ValueError
        try:
            found = kind(value)
        except OverflowError:
            raise ValueError from None
        inside = least <= found <= most and found != math.inf
        if not inside or (above and found == least) or (below and found == most):
            raise ValueError
        return found

    return Kind(f"{what}{upper}", check, "N" if kind is int else "X")


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip() or "\0" in value:
        raise ValueError
    return value


def text(metavar: str) -> Kind:
    """A text that is not blank."""
    return Kind("a text", _text, metavar)


def one_of(*choices: str) -> Kind:
    """One of some texts."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError
        return value

    return Kind(f"one of {', '.join(choices)}", check, "{" + ",".join(choices) + "}")


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError
    return value


FLAG = Kind("true or false", _flag, "")


def several(item: Kind, metavar: str) -> Kind:
    """A list, without repeats; one value stands for a list of it."""

    def check(value: Any) -> tuple:
        values = value if isinstance(value, (list, tuple)) else [value]
        found = tuple(item.check(one) for one in values)
        if len(set(found)) != len(found):
            raise ValueError
        return found

    return Kind(f"a list, without repeats, each {item.what}", check, metavar, many=list)


def mapping(item: Kind, metavar: str) -> Kind:
    """Names with values; the texts of a flag are NAME=VALUE."""

    def check(value: Any) -> dict[str, Any]:
        if not isinstance(value, dict):
            raise ValueError
        return {_text(name): item.check(one) for name, one in value.items()}

    def pairs(texts: list[str]) -> dict[str, str]:
        found = dict(text.rpartition("=")[::2] for text in texts)
        if len(found) != len(texts):
            raise ValueError
        return found

    return Kind(f"names with values, each {item.what}", check, metavar, many=pairs)


def key(default: Any, kind: Kind, what: str, or_none: bool = False) -> Any:
    """A field of the settings. If its default is None or empty, or with `or_none`, it also takes
    null, as a flag `none`, which stands for an empty list where it takes lists.
    """
    or_none = or_none or default is None or default in ((), {})
    metadata = {"kind": kind, "what": what, "or_none": or_none}
    if isinstance(default, dict):
        return dataclasses.field(default_factory=lambda: dict(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def checked(field: dataclasses.Field, value: Any, where: str) -> Any:
    """A key's value, from YAML or Python.

    Raises:
        ValueError: it is not of the key's kind. The error begins with `where`.
    """
    kind: Kind = field.metadata["kind"]
    if value is None and field.metadata["or_none"]:
        return None if kind.many is None else default_of(field)
    try:
        return kind.check(value)
    except (ValueError, TypeError):
        or_none = ", or null" if field.metadata["or_none"] else ""
        raise ValueError(f"{where} must be {kind.what}{or_none}, got {shown(value)}") from None


def add_flag(parser: Any, field: dataclasses.Field) -> None:
    """Add a key's flag. It is absent from the parsed arguments if it is not given."""
    kind: Kind = field.metadata["kind"]
    flag = f"--{field.name.replace('_', '-')}"
    options: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS}
    what = field.metadata["what"].replace("%", "%%")
    options["help"] = f"{what} (default: {default_text(field)})"
    if kind is FLAG:
        parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
    elif kind.many is not None:
        parser.add_argument(flag, nargs="*", metavar=kind.metavar, **options)
    else:
        parser.add_argument(flag, metavar=kind.metavar, **options)


def of_flag(field: dataclasses.Field, given: Any) -> Any:
    """A key's value of what its flag was given.

    Raises:
        ValueError: it is not of the key's kind.
    """
    kind: Kind = field.metadata["kind"]
    where = f"--{field.name.replace('_', '-')}"
    if given in ("none", ["none"]) and field.metadata["or_none"]:
        return checked(field, None, where)
    if kind.many is not None:
        try:
            given = kind.many(given)
        except ValueError:
            raise ValueError(f"{where} must be {kind.what}, got {shown(given)}") from None
    return checked(field, given, where)


def default_of(field: dataclasses.Field) -> Any:
    """A key's default, dataclasses.MISSING if it must be given."""
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def default_text(field: dataclasses.Field) -> str:
    """A key's default as the help and the documentation show it."""
    default = default_of(field)
    if isinstance(default, bool):
        return str(default).lower()
    if default is dataclasses.MISSING:
        return "must be given"
    if isinstance(default, (tuple, dict)):
        return " ".join(default) or "none"
    return "none" if default is None else f"{default}"


def shown(value: Any) -> str:
    """A short text of a value for an error. Containers are not walked: they may be huge."""
    if isinstance(value, (str, bytes)):
        value = value[: _LONGEST + 1]
    elif isinstance(value, int) and value.bit_length() > 4 * _LONGEST:
        return "a number of many digits"
    elif isinstance(value, (list, tuple)) and (len(value) > 8 or any(map(_nested, value))):
        return f"a list of {len(value)}"
    elif isinstance(value, set) or (
        isinstance(value, dict) and (len(value) > 8 or any(map(_nested, value.values())))
    ):
        return f"a {type(value).__name__} of {len(value)}"
    found = repr(value)
    return found if len(found) <= _LONGEST else f"{found[:_LONGEST]} ..."


def _nested(value: Any) -> bool:
    return isinstance(value, (list, tuple, dict, set)) or (
        isinstance(value, int) and value.bit_length() > 4 * _LONGEST
    )
