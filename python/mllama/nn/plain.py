"""Whether a module's parameters may be used without calling it."""

from torch import nn


def is_plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module does what `kind.forward` does and nothing else: no hooks, no
    forward of its own.
    """
    hooks = (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
    return type(module).forward is kind.forward and not hooks and "forward" not in module.__dict__
