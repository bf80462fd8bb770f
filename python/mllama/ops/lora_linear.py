"""A frozen linear layer with a trainable low-rank update (LoRA: Hu et al., 2021)."""

import math

import torch

from mllama.ops._dispatch import autocast_dtype, check_float, exact, fresh, register, use_kernel
from mllama.ops.recompute import recipe

_32_BITS = 0xFFFFFFFF


def lora_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return x W' + scale * (dropout(x) A') B' + bias, with gradients for x, A, B and bias, none
    for the frozen W.

    Args:
        x: [..., in], float32, bfloat16 or float16. Under torch.autocast it is cast to autocast's
            dtype first, as nn.Linear does; its gradient has the dtype it came in.
        weight: [out, in], one of the same dtypes; cast to x's for the product where it has another.
            It must not require a gradient.
        lora_a: [rank, in] and
        lora_b: [out, rank]: one of the same dtypes; float32 beside 16-bit x is read as it is.
        bias: [out] or None.
        scale: factor of the update, alpha / rank as a rule.
        dropout: probability with which an element of x is left out of the update, at least 0 and
            below 1; the others are divided by 1 - dropout. 0 outside training: the caller decides.
        seed: int64 [1], the same elements are left out for the same seed. None draws one from
            torch's generator, which torch.utils.checkpoint winds back before it computes a second
            time.

    Returns:
        [..., out] of x's dtype. The update is summed in float32 and added to the rounded x W' +
        bias. Saved for the backward pass: the arguments, in place of an x that `apply_recomputing`
            made what it was made from, and one float32 [rank] per row.

    Raises:
        TypeError: an argument is no tensor, or of another dtype; scale or dropout is no number.
        ValueError: shapes do not fit, scale is not finite, dropout is out of range, seed is not
            [1], or weight.requires_grad.
    """
    check_float(
        "lora_linear",
        optional=("bias",),
        x=x,
        weight=weight,
        lora_a=lora_a,
        lora_b=lora_b,
        bias=bias,
    )
    _check_numbers(scale, dropout)
    _check_seed(seed)
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            "lora_linear: weight.requires_grad is True, but only a frozen weight is taken: weight.requires_grad_(False)"
        )
    dtype = autocast_dtype(x)
    if dtype is not None:
        with exact(x):
            return lora_linear(x.to(dtype), weight, lora_a, lora_b, bias, scale, dropout, seed)
    if dropout == 0:
        seed = None
    elif seed is None:
        seed = torch.randint(1 << 62, (1,), device=x.device)
    if use_kernel(x):
        return _lora_linear(x, weight, lora_a, lora_b, bias, seed, scale, dropout)[0]
    _check(x, weight, lora_a, lora_b, bias)
    return reference(x, weight, lora_a, lora_b, bias, scale, dropout, seed)


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None = None,
    scale: float = 1.0,
    dropout: float = 0.0,
    seed: torch.Tensor | None = None,
) -> torch.Tensor:
    """`lora_linear` in plain torch, but for two things: dropout needs a seed, and all is computed
    in x's dtype.
    """
    linear = torch.nn.functional.linear
    dtype = x.dtype
    y = linear(x, weight.to(dtype), None if bias is None else bias.to(dtype))
    if dropout:
        x = x.masked_fill(~kept(seed, x.shape, dropout), 0)  # type: ignore[arg-type]  # it comes with a seed
    down = linear(x, lora_a.to(dtype)) * (scale / (1 - dropout))
    return y + linear(down, lora_b.to(dtype))


def kept(seed: torch.Tensor, shape: torch.Size, dropout: float) -> torch.Tensor:
    """The mask of what dropout keeps, bool of `shape`: a hash of seed, row and column, the same
    whatever computes it.
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
    """A bijection of 32 bits in which every bit depends on every other, one that hash-prospector
    found.

    `h` is int64, of values below 2^32; products with the two constants are taken in halves, for
    which 64 bits suffice.
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


def _check_seed(seed: torch.Tensor | None) -> None:
    if seed is None:
        return
    if not isinstance(seed, torch.Tensor):
        raise TypeError(
            f"lora_linear: seed must be a torch.Tensor or None, got {type(seed).__name__}"
        )
    if seed.dtype != torch.int64:
        raise TypeError(
            f"lora_linear: seed must be int64, got {str(seed.dtype).removeprefix('torch.')}"
        )
    if seed.shape != (1,):
        raise ValueError(f"lora_linear: seed must be [1], got {list(seed.shape)}")


def _check(
    x: torch.Tensor,
    weight: torch.Tensor,
    lora_a: torch.Tensor,
    lora_b: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    if x.dim() == 0:
        raise ValueError("lora_linear: x must have at least one dimension")
    width = x.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != width:
        raise ValueError(
            f"lora_linear: weight must be [out, {width}] for x {list(x.shape)}, got {list(weight.shape)}"
        )
    if lora_a.dim() != 2 or lora_a.shape[0] == 0 or lora_a.shape[1] != width:
        raise ValueError(
            f"lora_linear: lora_a must be [rank, {width}] with rank > 0 for x {list(x.shape)}, got {list(lora_a.shape)}"
        )
    out, rank = weight.shape[0], lora_a.shape[0]
    if lora_b.shape != (out, rank):
        raise ValueError(
            f"lora_linear: lora_b must be [{out}, {rank}], out of weight and rank of lora_a, got {list(lora_b.shape)}"
        )
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"lora_linear: bias must be [{out}], got {list(bias.shape)}")


def _fake(x, weight, lora_a, lora_b, bias, seed, scale, dropout):
    _check(x, weight, lora_a, lora_b, bias)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), x.new_empty(
        (*x.shape[:-1], lora_a.shape[0]), dtype=torch.float32
    )


def _setup(ctx, inputs, output):
    x, *tensors, ctx.scale, ctx.dropout = inputs
    small, known = output[1], recipe(x)
    ctx.mark_non_differentiable(small)
    ctx.set_materialize_grads(False)
    ctx.again = known and known.function
    ctx.save_for_backward(small, *tensors, *(known.inputs if known else [x]))


def _derivative(ctx, grad_y, grad_small):
    if grad_y is None:
        return (None,) * 8
    small, weight, lora_a, lora_b, bias, seed, *made_from = ctx.saved_tensors
    x = ctx.again(*made_from) if ctx.again else made_from[0]
    x_needed, _, *needed = ctx.needs_input_grad[:5]
    needed = (x_needed, *needed)
    with exact(grad_y):
        gradients = _lora_linear_backward(
            grad_y, x, weight, lora_a, lora_b, bias, small, seed, ctx.scale, ctx.dropout, *needed
        )
    grad_x, *others = (
        gradient if need else None for gradient, need in zip(gradients, needed, strict=True)
    )
    return grad_x, None, *others, None, None, None


def _backward_fake(grad_y, x, weight, lora_a, lora_b, bias, small, seed, scale, dropout, *needed):
    inputs = (x, lora_a, lora_b, weight if bias is None else bias)
    needed = (*needed[:3], needed[3] and bias is not None)
    return tuple(
        fresh(value) if need else value.new_empty(0)
        for value, need in zip(inputs, needed, strict=True)
    )


_lora_linear = register("lora_linear", fake=_fake, backward=_derivative, setup_context=_setup)
_lora_linear_backward = register("_lora_linear_backward", fake=_backward_fake)
