"""Checkpointed layers: the same gradients from a second forward pass, which hooks do not see."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from mllama.nn.checkpointing import CheckpointedLayer


class Layer(CheckpointedLayer):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.runs = 0

    def forward(self, x, scale=1.0, *, cache=None):
        self.runs += 1
        return (self.linear(x) * scale).tanh()


class Longer(Layer):
    """As FSDP2 makes them, a subclass; its forward calls its parent's."""

    def forward(self, x, scale=1.0, *, cache=None):
        return super().forward(x, scale, cache=cache) + x


def switched_on(layer: CheckpointedLayer, reentrant: bool = False) -> CheckpointedLayer:
    layer.gradient_checkpointing = True
    layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=reentrant)
    return layer


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", [Layer, type("Sharded", (Layer,), {}), Longer])
def test_gradients_are_the_same_from_one_more_forward(kind, reentrant):
    torch.manual_seed(0)
    layer, x = kind(), torch.randn(2, 4, requires_grad=True)
    expected = torch.autograd.grad(layer(x, 0.5).sum(), [x, layer.linear.weight])
    assert layer.runs == 1
    calls = []
    layer.register_forward_hook(lambda *_: calls.append(1))
    switched_on(layer, reentrant)
    layer.zero_grad()
    layer(x, 0.5).sum().backward()
    assert layer.runs == 3 and len(calls) == 1
    torch.testing.assert_close((x.grad, layer.linear.weight.grad), expected)


def test_a_cache_is_refused_where_it_would_be_written_twice():
    layer, x = switched_on(Layer()), torch.randn(2, 4)
    with pytest.raises(ValueError, match="cache"):
        layer(x, cache=object())
    with torch.no_grad():
        layer(x, cache=object())
    layer.eval()(x, cache=object())
    assert layer.runs == 2
