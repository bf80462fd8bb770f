"""Whether a module's weights may be read directly, or its forward called with more arguments."""

from torch import nn
from torch.nn.modules.module import (
    _global_backward_hooks,
    _global_backward_pre_hooks,
    _global_forward_hooks,
    _global_forward_pre_hooks,
)

HOOKS_OF_ALL = (
    _global_forward_hooks,
    _global_forward_pre_hooks,
    _global_backward_hooks,
    _global_backward_pre_hooks,
)
"""torch's hooks of every module, by key."""


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does exactly what `kind.forward` does: no hooks, of its own or
    of all modules, no overridden forward.
    """
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(HOOKS_OF_ALL)
    )
    return type(module).forward is kind.forward and not hooks and "forward" not in module.__dict__


def all_plain(module: nn.Module) -> bool:
    """Whether the module and all in it compute what their classes do."""
    return all(is_plain(part, type(part)) for part in module.modules())
