"""A model as DDP wraps it."""

from typing import Any

from torch import nn


class Replica(nn.Module):
    """A model for DDP, whose processes wait for one another's gradients. A loss that no trained
    parameter is on the way to gets zero times one of them, here, where DDP looks for what is used.

    Attributes:
        reached: whether the last loss had a way to a trained parameter of its own.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        self.reached = True

    def forward(self, **inputs: Any) -> Any:
        """The model's output."""
        output = self.model(**inputs)
        self.reached = output.loss.requires_grad
        if not self.reached:
            one = next(one for one in self.model.parameters() if one.requires_grad)
            output.loss = output.loss + 0 * one.sum()
        return output
