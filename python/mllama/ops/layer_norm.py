"""Layer normalisation (Ba et al., 2016) over the last dimension, with weight and bias."""

import torch

from mllama.ops._dispatch import check_float, check_value


def layer_norm(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return (x - mean) / sqrt(variance + eps) * weight + bias over the last dimension.

    Args:
        x: [..., D], float32, bfloat16 or float16.
        weight, bias: [D], one of the same dtypes; float32 beside 16-bit x is accepted.
        eps: added to the (biased) variance.

    Returns:
        [..., D] of x's dtype. Statistics and the product are taken in float32 and rounded once.

    Raises:
        TypeError: an argument is no tensor, or of another dtype.
        ValueError: weight or bias is not [D].
    """
    check_float("layer_norm", x=x, weight=weight, bias=bias)
    check_value(x.dim() >= 1, "layer_norm: x must have at least one dimension")
    for name, tensor in (("weight", weight), ("bias", bias)):
        check_value(
            tensor.shape == x.shape[-1:],
            f"layer_norm: {name} must be [{x.shape[-1]}], the last size of x {tuple(x.shape)}, got {tuple(tensor.shape)}",
        )
    return reference(x, weight, bias, eps)


def reference(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """`layer_norm` in plain torch."""
    h = x.float()
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h * weight.float() + bias.float()).to(x.dtype)
