"""Norms against their formulas."""

import pytest
import torch

from mllama.nn.norm import LayerNorm, RMSNorm, add_and_norm


def formula(x: torch.Tensor, scale: torch.Tensor, eps: float) -> torch.Tensor:
    return x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * scale


@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_rms_norm_scales_by_its_weight_and_offset(offset):
    norm, x, residual = RMSNorm(24, 1e-3, offset), torch.randn(3, 5, 24), torch.randn(3, 5, 24)
    torch.testing.assert_close(
        norm(x), formula(x, torch.ones(24), 1e-3)
    )  # it starts at a scale of 1
    torch.nn.init.normal_(norm.weight)
    scale = norm.weight + offset
    torch.testing.assert_close(norm(x), formula(x, scale, 1e-3))
    torch.testing.assert_close(norm(x, residual), formula(x + residual, scale, 1e-3))
    for found in (norm.add(x, residual), add_and_norm(norm, x, residual)):
        torch.testing.assert_close(found, (formula(x + residual, scale, 1e-3), x + residual))
    assert ("offset" in repr(norm)) == bool(offset)


def test_a_norm_with_hooks_or_another_norm_is_called():
    x, residual, calls = torch.randn(2, 24), torch.randn(2, 24), []
    norm = RMSNorm(24)
    plain = add_and_norm(norm, x, residual)
    norm.register_forward_hook(lambda *_: calls.append(1))
    torch.testing.assert_close(add_and_norm(norm, x, residual), plain)
    other = add_and_norm(torch.nn.RMSNorm(24, 1e-6), x, residual)
    torch.testing.assert_close(other, plain)
    assert calls == [1]


def test_a_sum_keeps_the_residuals_dtype():
    """Under autocast x comes in a smaller one."""
    x, residual = torch.randn(2, 24).bfloat16(), torch.randn(2, 24)
    for norm in (RMSNorm(24), torch.nn.RMSNorm(24)):
        normed, total = add_and_norm(norm, x, residual)
        assert normed.dtype == total.dtype == torch.float32
        assert torch.equal(total, x.float() + residual)


def test_layer_norm_is_torchs():
    norm, x = LayerNorm(24, 1e-3), torch.randn(3, 24)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter)
    expected = torch.nn.functional.layer_norm(x, (24,), norm.weight, norm.bias, 1e-3)
    torch.testing.assert_close(norm(x), expected)
