"""A frozen linear layer with a trainable low-rank update (LoRA: Hu et al., 2021)."""

import math

import torch

from mllama.ops._dispatch import (
    autocast_dtype,
    check_device,
    check_tensor,
    check_tensors,
    dtype_name,
    exact,
    fresh,
    register,
    use_kernel,
)
from mllama.ops.packed_layout import PACKINGS, unpack
from mllama.ops.packed_linear import check_packed, check_packing, packing_name
from mllama.ops.recompute import Recompute

_32_BITS = 0xFFFFFFFF
_DENSE = -1  # in place of a packing's number


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    recompute: Recompute | None = None,
    packing: str | None = None,
) -> torch.Tensor:
    """x W' + scale * (dropout(x) A') B' + bias, with gradients for x, A, B and bias, but not for
    the frozen W.

    Args:
        x: [..., in], float32, bfloat16 or float16. Under torch.autocast it is cast to autocast's
            dtype first, as in nn.Linear; its gradient has its original dtype.
        weight: [out, in], of the same dtypes; cast to x's dtype for the product. It must not
            require a gradient. With `packing`, uint8 as `pack_weight` returns it; its product is
            that of `dequantized_linear`.
        lora_a, lora_b: [rank, in] and [out, rank], of the same dtypes; float32 with 16-bit x is
            not cast.
        bias: [out] or None.
        scale: factor of the update, usually alpha / rank.
        dropout: probability of dropping an element of x in the update, at least 0 and below 1; the
            others are divided by 1 - dropout. The caller passes 0 outside training.
        seed: int64 [1], selects the dropped elements. Default: drawn from torch's generator, which
            torch.utils.checkpoint restores before recomputing.
        recompute: how x was computed. The kernel's backward pass then stores the inputs of that
            function and recomputes x. Ignored if recompute.result is not x.
        packing: format of a packed weight. Default: weight is dense.

    Returns:
        [..., out] in x's dtype. The update is summed in float32 and added to the rounded x W' +
        bias. Saved for the backward pass: the arguments and one float32 [rank] per row.

    Raises:
        TypeError: an argument is not a tensor of these dtypes; scale or dropout is not a number.
        ValueError: shapes do not fit, scale is not finite, dropout is out of range, seed is not
            [1], packing is not known, or weight requires a gradient.
    """
    _check_numbers(scale, dropout)
    if torch.is_grad_enabled() and getattr(weight, "requires_grad", False):
        raise ValueError(
            "lora_linear: weight.requires_grad is True, but only a frozen weight is taken: "
            "weight.requires_grad_(False)"
        )
    if packing is not None:
        check_packing("lora_linear", packing)
    number = _DENSE if packing is None else PACKINGS[packing].number
    dtype = autocast_dtype(x)
    if dtype is not None:
        _check(x, weight, lora_a, lora_b, bias, seed, scale, dropout, number)
        again = recompute if x.dtype == dtype else None
        with exact(x):
            return lora_linear(
                x.to(dtype), weight, lora_a, lora_b, bias, scale, dropout, seed, again, packing
            )
    if seed is not None:
        _check_seed(seed)
    if dropout == 0:
        seed = None
    elif seed is None:
        check_tensor("lora_linear", "x", x)
        seed = torch.randint(1 << 62, (1,), device=x.device)
    arguments = (x, weight, lora_a, lora_b, bias, seed, scale, dropout, number)
    if use_kernel("lora_linear", x):
        if recompute is None or recompute.result is not x or not x.requires_grad:
            return _lora_linear(*arguments)[0]
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return _Recomputing.apply(*arguments, recompute)[0]
        return _lora_linear(*arguments)[0]
    _check(*arguments)
    return reference(x, weight, lora_a, lora_b, bias, scale, dropout, seed, packing)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
    packing: str | None = None,
) -> torch.Tensor:
    """`lora_linear` in plain torch, except that dropout needs a seed and everything is computed in
    x's dtype.
    """
    linear = torch.nn.functional.linear
    dtype = x.dtype
    if packing is not None:
        weight = unpack(weight, len(lora_b), x.shape[-1], packing)
    y = linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    if dropout:
        assert seed is not None  # required with dropout
        x = x.masked_fill(~keep_mask(seed, x.shape, dropout), 0)
    down = linear(x, lora_a.to(dtype)) * (scale / (1 - dropout))
    return y + linear(down, lora_b.to(dtype))


def keep_mask(seed: torch.Tensor, shape: torch.Size, dropout: float) -> torch.Tensor:
    """Dropout's mask, bool of `shape`: a hash of seed, row and column, the same in every
    implementation.
    """
    width = shape[-1]
    rows = torch.arange(math.prod(shape[:-1]), device=seed.device)[:, None] & _32_BITS
    columns = torch.arange(width, device=seed.device)
    low, high = seed & _32_BITS, seed >> 32 & _32_BITS
    row_key = _mix(rows ^ _mix(low ^ _mix(high)))
    row_shift = _mix(row_key ^ _mix(high ^ 0x9E3779B9))
    return ((_mix(columns ^ row_key) + row_shift & _32_BITS) >= int(dropout * (1 << 32))).view(
        shape
    )


def _mix(h: torch.Tensor) -> torch.Tensor:
    """A bijection of 32-bit integers with good avalanche, found by hash-prospector.

    `h` is int64 with values below 2^32; products with the two constants are computed in halves to
    fit 64 bits.
    """
    h = h ^ h >> 16
    h = ((h * 0x21F0 & 0xFFFF) << 16) + h * 0xAAAD & _32_BITS
    h = h ^ h >> 15
    h = ((h * 0x735A & 0xFFFF) << 16) + h * 0x2D97 & _32_BITS
    return h ^ h >> 15


def _check_numbers(scale: float, dropout: float) -> None:
    for name, value in (("scale", scale), ("dropout", dropout)):
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"lora_linear: {name} must be a number, got {type(value).__name__}")
    if not -math.inf < scale < math.inf:
        raise ValueError(f"lora_linear: scale must be finite, got {scale}")
    if not 0 <= dropout < 1:
        raise ValueError(f"lora_linear: dropout must be at least 0 and below 1, got {dropout}")


def _check_seed(seed: torch.Tensor) -> None:
    check_tensor("lora_linear", "seed", seed)
    if seed.dtype != torch.int64:
        raise TypeError(f"lora_linear: seed must be int64, got {dtype_name(seed)}")
    if seed.shape != (1,):
        raise ValueError(f"lora_linear: seed must be [1], got {list(seed.shape)}")


def _check(x, weight, lora_a, lora_b, bias, seed, scale, dropout, packing=_DENSE) -> None:
    tensors = {"x": x, "lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    if packing == _DENSE:
        tensors = {"x": x, "weight": weight} | tensors
    check_tensors("lora_linear", optional=("bias",), **tensors)
    if seed is not None:
        _check_seed(seed)
        check_device("lora_linear", "seed", seed, "x", x)
    if x.dim() == 0:
        raise ValueError("lora_linear: x must have at least one dimension")
    width = x.shape[-1]
    if packing == _DENSE and (weight.dim() != 2 or weight.shape[1] != width):
        raise ValueError(
            f"lora_linear: weight must be [out, {width}] for x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    if lora_a.dim() != 2 or lora_a.shape[0] == 0 or lora_a.shape[1] != width:
        raise ValueError(
            f"lora_linear: lora_a must be [rank, {width}] with rank > 0 for x {list(x.shape)}, "
            f"got {list(lora_a.shape)}"
        )
    out, rank = (weight if packing == _DENSE else lora_b).shape[:1].numel(), lora_a.shape[0]
    if lora_b.shape != (out, rank):
        raise ValueError(
            f"lora_linear: lora_b must be [{out}, {rank}], out of weight and rank of lora_a, "
            f"got {list(lora_b.shape)}"
        )
    if packing != _DENSE:
        check_packed("lora_linear", weight, out, width, packing_name(packing))
        check_device("lora_linear", "weight", weight, "x", x)
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"lora_linear: bias must be [{out}], got {list(bias.shape)}")


def _fake(x, weight, lora_a, lora_b, bias, seed, scale, dropout, packing=_DENSE):
    return x.new_empty((*x.shape[:-1], lora_b.shape[0])), x.new_empty(
        (*x.shape[:-1], lora_a.shape[0]), dtype=torch.float32
    )


def _setup(ctx, inputs, output, recompute=None):
    x, *tensors, ctx.scale, ctx.dropout, ctx.packing = inputs
    small = output[1]
    ctx.mark_non_differentiable(small)
    ctx.set_materialize_grads(False)
    ctx.function = recompute and recompute.function
    ctx.save_for_backward(small, *tensors, *(recompute.inputs if recompute else [x]))


def _derivative(ctx, grad_y, grad_small):
    if grad_y is None:
        return (None,) * 9
    small, weight, lora_a, lora_b, bias, seed, *made_from = ctx.saved_tensors
    x = ctx.function(*made_from) if ctx.function else made_from[0]
    x_needed, _, *needed = ctx.needs_input_grad[:5]
    needed = (x_needed, *needed)
    with exact(grad_y):
        gradients = _lora_linear_backward(
            grad_y, x, weight, lora_a, lora_b, bias, small, seed, ctx.scale, ctx.dropout, *needed, ctx.packing
        )
    grad_x, *others = (
        gradient if need else None for gradient, need in zip(gradients, needed, strict=True)
    )
    return grad_x, None, *others, None, None, None, None


def _backward_fake(grad_y, x, weight, lora_a, lora_b, bias, small, seed, scale, dropout, *needed):
    inputs = (x, lora_a, lora_b, x if bias is None else bias)
    needed = (*needed[:3], needed[3] and bias is not None)
    return tuple(
        fresh(value) if need else value.new_empty(0)
        for value, need in zip(inputs, needed, strict=True)
    )


class _Recomputing(torch.autograd.Function):
    """The operator with its formula, saving the inputs that x was computed from instead of x."""

    @staticmethod
    def forward(*arguments_and_recompute):
        return _lora_linear(*arguments_and_recompute[:-1])

    @staticmethod
    def setup_context(ctx, inputs, output):
        *arguments, recompute = inputs
        _setup(ctx, arguments, output, recompute)

    @staticmethod
    def backward(ctx, *grads):
        return (*_derivative(ctx, *grads), None)


_lora_linear = register(
    "lora_linear", check=_check, fake=_fake, backward=_derivative, setup_context=_setup
)
_lora_linear_backward = register("_lora_linear_backward", fake=_backward_fake)
