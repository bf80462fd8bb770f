"""Arguments: one class for scripts of two families, those that build from a config object and those
that build from a plain dict or from sizes; and methods that hand on what they do not read
themselves.
"""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def by_construction(*, sizes: str, config: str) -> Callable[[Callable], Callable]:
    """A decorator of a `forward` that takes keywords alone: arguments without one get the names
    that go with how the module was built.

    Args:
        sizes: names in order, for a module built from sizes or from a dict: its `from_config` is
            False.
        config: names in order, for one built from a config object.
    """
    orders = {False: tuple(sizes.split()), True: tuple(config.split())}

    def decorate(forward: Callable) -> Callable:
        @functools.wraps(forward)
        def positional(self, *args, **kwargs):
            owner, names = type(self).__name__, orders[self.from_config]
            if len(args) > len(names):
                raise TypeError(
                    f"{owner}: takes at most {len(names)} arguments without a name ({', '.join(names)}), got {len(args)}"
                )
            placed = dict(zip(names, args, strict=False))
            if twice := placed.keys() & kwargs.keys():
                raise TypeError(
                    f"{owner}: {', '.join(sorted(twice))} given twice, by place and by name"
                )
            return forward(self, **placed, **kwargs)

        own = inspect.signature(forward).parameters
        names = dict.fromkeys(orders[False], inspect.Parameter.POSITIONAL_OR_KEYWORD)
        names |= {
            name: inspect.Parameter.KEYWORD_ONLY for name in orders[True] if name not in names
        }
        defaults = {name: own[name].default if name in own else None for name in names}
        shown = [
            inspect.Parameter(name, kind, default=defaults[name]) for name, kind in names.items()
        ]
        positional.__signature__ = inspect.Signature([own["self"], *shown])
        return positional

    return decorate


def hands_on(to: Callable) -> Callable[[Callable], Callable]:
    """A decorator of a method that hands its kwargs on to another: its signature says their names,
    which `generate` and Trainer ask for.
    """
    theirs = inspect.signature(to).parameters.values()

    def decorate(method: Callable) -> Callable:
        *own, rest = inspect.signature(method).parameters.values()
        names = {parameter.name for parameter in own}
        more = [
            one.replace(kind=one.KEYWORD_ONLY)
            for one in theirs
            if one.kind is not one.VAR_KEYWORD and one.name not in names
        ]
        method.__signature__ = inspect.signature(method).replace(parameters=[*own, *more, rest])
        return method

    return decorate


def either(owner: str, **named: Any) -> Any:
    """The one argument that was given, of several names for it.

    Raises:
        TypeError: none or several were.
    """
    given = [value for value in named.values() if value is not None]
    if len(given) != 1:
        raise TypeError(f"{owner}: give one of {' and '.join(named)}")
    return given[0]


@contextmanager
def made_in(dtype: torch.dtype | None) -> Iterator[None]:
    """Parameters made inside are of this dtype from the start; None leaves torch's default."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(before if dtype is None else dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
