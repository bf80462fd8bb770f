"""Gradient checkpointing: activations are recomputed in the backward pass instead of stored."""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn


class CheckpointedLayer(nn.Module):
    """A layer that recomputes its activations in training if `gradient_checkpointing` is set.

    `forward` is checkpointed, not the call, so that hooks (FSDP2's) run once. Tensors whose
    gradients the reentrant variant must track are positional arguments.

    Attributes:
        gradient_checkpointing: the switch; transformers and accelerate look for this name.
        _gradient_checkpointing_func: `torch.utils.checkpoint.checkpoint` with its options, set
            with the switch.
    """

    gradient_checkpointing = False
    _gradient_checkpointing_func: Callable[..., Any]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "forward" in cls.__dict__:  # FSDP2 makes subclasses without a forward of their own
            cls.forward = _checkpointed(cls.forward)  # type: ignore[method-assign]


def _checkpointed(forward: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(forward)
    def run(self, *args, **kwargs):
        # A forward that calls super().forward is checkpointed once, by the outermost.
        outermost = type(self).forward is run
        checkpointing = self.gradient_checkpointing and self.training and torch.is_grad_enabled()
        if not (checkpointing and outermost):
            return forward(self, *args, **kwargs)
        if kwargs.get("cache") is not None:  # recomputing would write to it twice
            raise ValueError(
                f"{type(self).__name__}: cache must be None while activations are checkpointed"
            )
        return self._gradient_checkpointing_func(partial(forward, self, **kwargs), *args)

    return run
