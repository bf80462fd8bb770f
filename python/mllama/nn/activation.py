"""Activation functions by the names that configs use."""

import math
from collections.abc import Callable
from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from mllama.nn.packed import takes_activation
from mllama.ops.packed_linear import quick_gelu
from mllama.ops.recompute import recomputable


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh approximation in steps, rounded as transformers' `gelu_new` in 16 bits."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


def gelu_fast(x: torch.Tensor) -> torch.Tensor:
    """The tanh approximation with a rounded constant and another order of terms."""
    return 0.5 * x * (1 + torch.tanh(x * 0.7978845608 * (1 + 0.044715 * x * x)))


def gelu_erf(x: torch.Tensor) -> torch.Tensor:
    """GELU by its definition, in separate steps."""
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def gelu_10(x: torch.Tensor) -> torch.Tensor:
    """GELU clipped to [-10, 10]."""
    return F.gelu(x).clip(-10, 10)


def laplace(x: torch.Tensor) -> torch.Tensor:
    """MEGA's bounded alternative to a squared ReLU (https://arxiv.org/abs/2209.10655)."""
    return 0.5 * (1 + torch.erf((x - 0.707107) / (0.282095 * math.sqrt(2))))


def relu_squared(x: torch.Tensor) -> torch.Tensor:
    """relu(x)^2 (https://arxiv.org/abs/2109.08668)."""
    return F.relu(x).square()


def sqrt_softplus(x: torch.Tensor) -> torch.Tensor:
    """sqrt(softplus(x))."""
    return F.softplus(x).sqrt()


def softcap(x: torch.Tensor, cap: float | None) -> torch.Tensor:
    """cap * tanh(x / cap), within +-cap; x itself if cap is None."""
    return x if cap is None else torch.tanh(x / cap) * cap


def linear(x: torch.Tensor) -> torch.Tensor:
    """The identity."""
    return x


# transformers' names (ACT2FN), without those with learned parameters (prelu, xielu).
ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_10": gelu_10,
    "gelu_accurate": gelu_tanh,
    "gelu_fast": gelu_fast,
    "gelu_new": gelu_tanh,
    "gelu_python": gelu_erf,
    "gelu_python_tanh": gelu_tanh,
    "gelu_pytorch_tanh": partial(F.gelu, approximate="tanh"),
    "hardswish": F.hardswish,
    "laplace": laplace,
    "leaky_relu": F.leaky_relu,
    "linear": linear,
    "mish": F.mish,
    "quick_gelu": quick_gelu,
    "relu": F.relu,
    "relu2": relu_squared,
    "relu6": F.relu6,
    "sigmoid": torch.sigmoid,
    "silu": F.silu,
    "sqrtsoftplus": sqrt_softplus,
    "swish": F.silu,
    "tanh": torch.tanh,
}
# Those whose own backward pass saves x rather than the result.
_SAVES_INPUT = frozenset(
    name for name in ACTIVATIONS if "gelu" in name or name in ("hardswish", "mish", "silu", "swish")
)


def activated(linear: nn.Module, x: torch.Tensor, activation: str) -> torch.Tensor:
    """activation(linear(x)), as one operator where the layer is packed.

    Args:
        linear: the layer.
        x: its input.
        activation: one of ACTIVATIONS.
    """
    if takes_activation(linear, activation):
        return linear(x, activation)
    before, function = linear(x), ACTIVATIONS[activation]
    after = function(before)
    return recomputable(after, function, before) if activation in _SAVES_INPUT else after
