"""Modules under older attribute names: one implementation, two spellings.

A class of the package computes with `self.q_proj`; scripts, `state_dict()` and adapters' target
names say `W_query`. `older_names` makes a subclass whose children really are called as the scripts
say, while the package's spelling reads the same child.
"""

from collections.abc import Callable

from torch import nn


def older_names(**names: str) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """A decorator of a subclass of one of the package's modules: its child `ours` is called
    `theirs`, for every `ours="theirs"`.

    `state_dict()`, `named_modules()` and `setattr` know the older name alone; `module.ours` still
    is that child, so that the package's forward pass, written against its own names, runs whatever
    a script puts in the older one's place.
    """

    def decorate(kind: type[nn.Module]) -> type[nn.Module]:
        constructor = kind.__init__

        def __init__(self, *args, **kwargs):
            constructor(self, *args, **kwargs)
            renamed = {names.get(name, name): child for name, child in self._modules.items()}
            self._modules.clear()  # in place, so that the children keep their order
            self._modules.update(renamed)

        __init__.__wrapped__ = constructor  # for inspect.signature
        kind.__init__ = __init__
        for ours, theirs in names.items():
            setattr(kind, ours, _other_name(theirs))
        return kind

    return decorate


def _other_name(theirs: str) -> property:
    return property(lambda self: getattr(self, theirs))
