"""Feed-forward blocks."""

import torch
from torch import nn

from mllama.nn.activation import activated
from mllama.nn.adapted import linears
from mllama.ops.gated import geglu, swiglu

_GATES = {"silu": swiglu, "swish": swiglu, "gelu_pytorch_tanh": geglu}


class GatedMLP(nn.Module):
    """down(act(gate(x)) * up(x))."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str = "silu", bias: bool = False
    ):
        super().__init__()
        if activation not in _GATES:
            raise ValueError(
                f"GatedMLP: activation must be one of {', '.join(_GATES)}, got {activation!r}"
            )
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=bias)
        self.gate = _GATES[activation]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden_size] -> the same shape."""
        gate, up = linears(x, self.gate_proj, self.up_proj)
        product = self.gate(gate, up)
        del gate, up  # frees their memory here if there is no backward pass
        return self.down_proj(product)


class MLP(nn.Module):
    """fc2(act(fc1(x)))."""

    def __init__(
        self, hidden_size: int, intermediate_size: int, activation: str = "gelu_pytorch_tanh"
    ):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, intermediate_size)
        self.activation = activation
        self.fc2 = nn.Linear(intermediate_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., hidden_size] -> the same shape."""
        return self.fc2(activated(self.fc1, x, self.activation))
