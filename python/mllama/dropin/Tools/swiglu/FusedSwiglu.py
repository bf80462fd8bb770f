"""`Tools.swiglu.FusedSwiglu`: SwiGLU with its projections as parameters of its own, and the
feed-forward block around it.
"""

import math

import torch
from torch import nn

from mllama.ops.gated import swiglu

__all__ = ["FusedFeedForward", "FusedSwiGLU", "convert_feedforward_to_fused"]


class FusedSwiGLU(nn.Module):
    """silu(x W_gate' + b_gate) * (x W_up' + b_up).

    Args:
        hidden_size: width of x.
        intermediate_size: width of the result.
        bias: whether there are `b_gate` and `b_up`; without, they are None.

    Attributes:
        w_gate, w_up: [intermediate_size, hidden_size].
        b_gate, b_up: [intermediate_size] or None.
    """

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.w_gate = nn.Parameter(torch.empty(intermediate_size, hidden_size))
        self.w_up = nn.Parameter(torch.empty(intermediate_size, hidden_size))
        self.b_gate = nn.Parameter(torch.empty(intermediate_size)) if bias else None
        self.b_up = nn.Parameter(torch.empty(intermediate_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as nn.Linear does; biases are zero."""
        for weight in (self.w_gate, self.w_up):
            nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        for bias in (self.b_gate, self.b_up):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> [..., intermediate_size]."""
        return swiglu(
            nn.functional.linear(x, self.w_gate, self.b_gate),
            nn.functional.linear(x, self.w_up, self.b_up),
        )

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, intermediate_size={self.intermediate_size}, bias={self.b_gate is not None}"


class FusedFeedForward(nn.Module):
    """w_down(swiglu(x)). Arguments as `FusedSwiGLU`; `bias` is for `w_down` too."""

    def __init__(self, hidden_size: int, intermediate_size: int, bias: bool = False):
        super().__init__()
        self.hidden_size, self.intermediate_size = hidden_size, intermediate_size
        self.swiglu = FusedSwiGLU(hidden_size, intermediate_size, bias)
        self.w_down = nn.Linear(intermediate_size, hidden_size, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., hidden_size] -> the same shape."""
        return self.w_down(self.swiglu(x))


# How feed-forward blocks name their three layers: gate, up, down.
_LAYERS = (("w1", "w3", "w2"), ("fc1", "fc2", "fc3"), ("gate_proj", "up_proj", "down_proj"))


def convert_feedforward_to_fused(feedforward_module: nn.Module) -> FusedFeedForward:
    """A `FusedFeedForward` with copies of a feed-forward block's weights, in their dtype and on
    their device.

    Args:
        feedforward_module: with linear layers `w1`, `w3`, `w2` for gate, up and down; or `fc1`,
            `fc2`, `fc3`; or `gate_proj`, `up_proj`, `down_proj`.

    Raises:
        TypeError: a module without such layers.
    """
    for names in _LAYERS:
        layers = [getattr(feedforward_module, name, None) for name in names]
        if all(isinstance(layer, nn.Linear) for layer in layers):
            break
    else:
        names = "; ".join(", ".join(names) for names in _LAYERS)
        raise TypeError(
            f"feedforward_module must have linear layers {names}; got {type(feedforward_module).__name__}"
        )
    gate, up, down = layers
    fused = FusedFeedForward(gate.in_features, gate.out_features, gate.bias is not None)
    fused = fused.to(device=gate.weight.device, dtype=gate.weight.dtype)
    copies = {"swiglu.w_gate": gate.weight, "swiglu.w_up": up.weight, "w_down.weight": down.weight}
    copies |= {"swiglu.b_gate": gate.bias, "swiglu.b_up": up.bias, "w_down.bias": down.bias}
    fused.load_state_dict({name: tensor for name, tensor in copies.items() if tensor is not None})
    return fused
