"""Frozen linear layers with trainable low-rank updates (LoRA: Hu et al., 2021)."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from mllama.ops._dispatch import (
    autocast_dtype,
    check_device,
    check_dtype,
    check_number,
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
from mllama.ops.recompute import Saved, cast, restored

_32_BITS = 0xFFFFFFFF
DENSE = -1  # in place of a packing's number
_LARGEST = torch.finfo(torch.float32).max


class LoraLayer(NamedTuple):
    """The layer x W' + scale * (dropout(x) A') B' + bias. Fields as `lora_linear`'s arguments."""

    weight: torch.Tensor
    lora_a: torch.Tensor
    lora_b: torch.Tensor
    bias: torch.Tensor | None = None
    scale: float = 1.0
    dropout: float = 0.0
    packing: str | None = None


def lora_linear(
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
        packing: format of a packed weight. Default: weight is dense.

    Returns:
        [..., out] in x's dtype. The update is summed in float32 and added to the rounded x W' +
        bias. Saved for the backward pass: the arguments and one float32 [rank] per row; for an x
        that `mllama.ops.recompute` knows how to compute, what it is computed from.

    Raises:
        TypeError: an argument is not a tensor of these dtypes; scale or dropout is not a number.
        ValueError: shapes do not fit, scale is not finite, dropout is out of range, seed is not
            [1], packing is not known, or weight requires a gradient.
    """
    layer = LoraLayer(weight, lora_a, lora_b, bias, scale, dropout, packing)
    return lora_linears(x, [layer], seed)[0]


def lora_linears(
    x: torch.Tensor, layers: Sequence[LoraLayer], seeds: torch.Tensor | None = None
) -> list[torch.Tensor]:
    """`lora_linear` of several layers of one input, as one node: x is saved once, its low-rank
    products are computed in one pass where nothing is dropped, and its gradient is summed in place.

    Args:
        x: as `lora_linear`.
        layers: at least one. Those of lora_a have one dtype. All have a bias or none has.
        seeds: int64 [len(layers)], for dropout. Default: drawn from torch's generator.
    Returns:
        The output of each layer, as `lora_linear`.

    Raises:
        TypeError, ValueError: as `lora_linear`; layers is empty, or they differ in what they may
            not differ in.
    """
    _check_layers(layers)
    dtype = autocast_dtype(x)
    if dtype is not None:
        _check(x, *_lists(layers), seeds, *_numbers(layers))
        with exact(x):
            return lora_linears(cast(x, dtype), layers, seeds)
    if seeds is not None:
        _check_seeds(seeds, len(layers))
    if not any(layer.dropout for layer in layers):
        seeds = None
    elif seeds is None:
        check_tensor("lora_linear", "x", x)
        seeds = torch.randint(1 << 62, (len(layers),), device=x.device)
    arguments = (x, *_lists(layers), seeds, *_numbers(layers))
    if use_kernel("lora_linear", x):
        return list(_lora_linear(*arguments)[0])
    _check(*arguments)
    return [
        reference(
            x, *layer[:-1], None if seeds is None else seeds[index : index + 1], layer.packing
        )
        for index, layer in enumerate(layers)
    ]


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


def _lists(layers: Sequence[LoraLayer]) -> tuple[list, list, list, list]:
    """The tensors of the layers as the operator takes them; no biases are an empty list."""
    weights, a, b, biases, *_ = map(list, zip(*layers, strict=True))
    return weights, a, b, [] if all(bias is None for bias in biases) else biases


def _numbers(layers: Sequence[LoraLayer]) -> tuple[list[float], list[float], list[int]]:
    """Scales, dropouts and the kernels' numbers of packings."""
    packings = [
        DENSE if layer.packing is None else PACKINGS[layer.packing].number for layer in layers
    ]
    return (
        [float(layer.scale) for layer in layers],
        [float(layer.dropout) for layer in layers],
        packings,
    )


def _check_layers(layers: Sequence[LoraLayer]) -> None:
    """Check what is not seen from the operator's arguments: numbers, and gradients of weights."""
    if not layers:
        raise ValueError("lora_linear: layers must be at least one")
    for layer in layers:
        check_number("lora_linear", "scale", layer.scale)
        check_number("lora_linear", "dropout", layer.dropout)
        if not abs(layer.scale) <= _LARGEST:
            raise ValueError(f"lora_linear: scale must be finite in float32, got {layer.scale}")
        if not 0 <= layer.dropout < 1:
            raise ValueError(
                f"lora_linear: dropout must be at least 0 and below 1, got {layer.dropout}"
            )
        if layer.packing is not None:
            check_packing("lora_linear", layer.packing)
        if torch.is_grad_enabled() and getattr(layer.weight, "requires_grad", False):
            raise ValueError(
                "lora_linear: weight.requires_grad is True, but only a frozen weight is taken: "
                "weight.requires_grad_(False)"
            )
    if len({layer.bias is None for layer in layers}) > 1:
        raise ValueError("lora_linear: bias must be given for all layers or for none")


def _check_seeds(seeds: torch.Tensor, count: int) -> None:
    check_dtype("lora_linear", "seed", seeds, torch.int64)
    if seeds.shape != (count,):
        raise ValueError(f"lora_linear: seed must be [{count}], got {list(seeds.shape)}")


def _check(x, weights, lora_a, lora_b, biases, seeds, scales, dropouts, packings) -> None:
    for index, (weight, a, b) in enumerate(zip(weights, lora_a, lora_b, strict=True)):
        _check_layer(x, weight, a, b, biases[index] if biases else None, packings[index])
        if a.dtype != lora_a[0].dtype:
            raise TypeError(
                "lora_linear: lora_a must have one dtype in all layers, "
                f"got {dtype_name(lora_a[0])} and {dtype_name(a)}"
            )
    if seeds is not None:
        _check_seeds(seeds, len(weights))
        check_device("lora_linear", "seed", seeds, "x", x)


def _check_layer(x, weight, lora_a, lora_b, bias, packing) -> None:
    dense = packing == DENSE
    tensors = {"x": x} | ({"weight": weight} if dense else {})
    tensors |= {"lora_a": lora_a, "lora_b": lora_b, "bias": bias}
    check_tensors("lora_linear", optional=("bias",), **tensors)
    if x.dim() == 0:
        raise ValueError("lora_linear: x must have at least one dimension")
    width = x.shape[-1]
    if dense and (weight.dim() != 2 or weight.shape[1] != width):
        raise ValueError(
            f"lora_linear: weight must be [out, {width}] for x {list(x.shape)}, "
            f"got {list(weight.shape)}"
        )
    if lora_a.dim() != 2 or lora_a.shape[0] == 0 or lora_a.shape[1] != width:
        raise ValueError(
            f"lora_linear: lora_a must be [rank, {width}] with rank > 0 for x {list(x.shape)}, "
            f"got {list(lora_a.shape)}"
        )
    out, rank = (weight if dense else lora_b).shape[:1].numel(), lora_a.shape[0]
    if lora_b.shape != (out, rank):
        raise ValueError(
            f"lora_linear: lora_b must be [{out}, {rank}], out of weight and rank of lora_a, "
            f"got {list(lora_b.shape)}"
        )
    if not dense:
        check_packed("lora_linear", weight, out, width, packing_name(packing))
        check_device("lora_linear", "weight", weight, "x", x)
    if bias is not None and bias.shape != (out,):
        raise ValueError(f"lora_linear: bias must be [{out}], got {list(bias.shape)}")


def _fake(x, weights, lora_a, lora_b, biases, seeds, scales, dropouts, packings):
    batch, ranks = x.shape[:-1], sum(a.shape[0] for a in lora_a)
    ys = [x.new_empty((*batch, b.shape[0])) for b in lora_b]
    return ys, x.new_empty((*batch, ranks), dtype=torch.float32)


def _setup(ctx, inputs, output):
    x, *lists, seeds, ctx.scales, ctx.dropouts, ctx.packings = inputs
    small = output[1]
    ctx.mark_non_differentiable(small)
    ctx.set_materialize_grads(False)
    ctx.lengths = [len(tensors) for tensors in lists]
    ctx.function, made_from = Saved.of(x)
    ctx.save_for_backward(small, seeds, *(one for tensors in lists for one in tensors), *made_from)


def _derivative(ctx, grad_ys, grad_small):
    small, seeds, *tensors = ctx.saved_tensors
    lists = []
    for length in ctx.lengths:
        lists.append(tensors[:length])
        tensors = tensors[length:]
    x = restored(ctx.function, tensors)
    weights, lora_a, lora_b = lists[:3]
    # The output of a layer that nothing came of has no gradient.
    grad_ys = [
        x.new_zeros((*x.shape[:-1], len(b))) if grad is None else grad
        for grad, b in zip(grad_ys, lora_b, strict=True)
    ]
    x_needed, _, *needed = ctx.needs_input_grad[:5]
    some_needed = (x_needed, *(any(layers) for layers in needed))
    with exact(grad_ys[0]):
        grad_x, grad_a, *others = _lora_linear_backward(
            grad_ys, x, *lists, small, seeds, ctx.scales, ctx.dropouts, ctx.packings, *some_needed
        )
    ranks = [len(a) for a in lora_a]
    grads_a = grad_a.split(ranks) if some_needed[1] else [None] * len(ranks)
    gradients = (
        [one if need else None for one, need in zip(found, needs, strict=True)]
        for found, needs in zip((grads_a, *others), needed, strict=True)
    )
    return grad_x if x_needed else None, [None] * len(weights), *gradients, None, None, None, None


def _backward_fake(grad_ys, x, weights, lora_a, lora_b, biases, small, *rest):
    x_needed, a_needed, b_needed, bias_needed = rest[-4:]
    shape = (sum(len(a) for a in lora_a), x.shape[-1])
    return (
        fresh(x) if x_needed else x.new_empty(0),
        lora_a[0].new_empty(shape if a_needed else 0),
        [fresh(b) if b_needed else b.new_empty(0) for b in lora_b],
        [fresh(bias) if bias_needed else bias.new_empty(0) for bias in biases],
    )


_lora_linear = register(
    "lora_linear", check=_check, fake=_fake, backward=_derivative, setup_context=_setup
)
_lora_linear_backward = register("_lora_linear_backward", fake=_backward_fake)
