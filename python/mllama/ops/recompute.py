"""Activations that are recomputed in the backward pass instead of saved."""

from collections.abc import Callable
from typing import NamedTuple

import torch


class Recompute(NamedTuple):
    """How `result` was computed: function(*inputs), cheap enough to repeat in a backward pass.

    The consumer saves `inputs` instead of `result`; the function's own backward pass saves them
    anyway.
    """

    result: torch.Tensor
    function: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
