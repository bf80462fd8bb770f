"""Activations that are computed again in the backward pass instead of being kept for it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Recipe:
    """How a tensor was made: function(*inputs)."""

    function: Callable[..., torch.Tensor]
    inputs: tuple[torch.Tensor, ...]
    version: int


def apply_recomputing(
    consumer: Callable[[torch.Tensor], torch.Tensor],
    function: Callable[..., torch.Tensor],
    *inputs: torch.Tensor,
) -> torch.Tensor:
    """Return consumer(x) of x = function(*inputs), a function so cheap that the consumer's gradient
    may take it again.

    The consumer is called with a plain tensor. An operator below it that would save it for its
    backward pass asks `recipe` and may save `inputs` instead, which `function` keeps anyway; any
    other saves x as ever.
    """
    x = function(*inputs)
    if (
        not x.requires_grad or torch.compiler.is_compiling()
    ):  # compilers decide such things themselves
        del inputs  # their memory is free while the consumer runs
        return consumer(x)
    x._mllama_recipe = Recipe(function, inputs, x._version)  # type: ignore[attr-defined]
    try:
        return consumer(x)
    finally:
        del x._mllama_recipe  # type: ignore[attr-defined]


def recipe(x: torch.Tensor) -> Recipe | None:
    """How x can be made again; None where nothing is known, or it was changed since."""
    known = getattr(x, "_mllama_recipe", None)
    return known if known is not None and known.version == x._version else None
