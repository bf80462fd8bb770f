"""Activations that are computed again in the backward pass instead of being kept for it."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Recompute(NamedTuple):
    """How `result` was made: function(*inputs), so cheap that a backward pass may do it again.

    Whoever would save `result` saves `inputs` instead, which the function's own backward pass keeps
    anyway.
    """

    result: torch.Tensor
    function: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
