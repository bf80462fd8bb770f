"""Modules in place of others."""

from torch import nn


class Around(nn.Module):
    """A module in place of another, which it calls. It has the other's attributes if asked."""

    def __init__(self, inner, change, delegates):
        super().__init__()
        self.inner, self.change, self.delegates = inner, change, delegates

    def forward(self, *args, **kwargs):
        output = self.inner(*args, **kwargs)
        if isinstance(output, tuple):
            return self.change(output[0]), *output[1:]
        return self.change(output)

    def __getattr__(self, name):
        if name in self._modules or not self.delegates:
            return super().__getattr__(name)
        return getattr(self._modules["inner"], name)
