"""Linear layers on packed weights: 16- or 32-bit floats, or 8- to 4-bit codes with scales, in the
order in which products with one row and with many read them. csrc/kernels/cpu/packed_linear.h
describes the layout.
"""

from collections.abc import Callable, Collection
from functools import partial

import torch
from torch.nn.functional import gelu

from mllama.ops._dispatch import (
    FLOAT_DTYPES,
    check_device,
    check_dtype,
    check_tensor,
    check_tensors,
    check_vectors,
    dtype_name,
    register,
    use_kernel,
)
from mllama.ops.packed_layout import LANES, PACKINGS, pack, packed_bytes, split_groups, unpack


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    """x * sigmoid(1.702 x), CLIP's activation."""
    return x * torch.sigmoid(1.702 * x)


_VALUES_AT_ONCE = 2**24  # of a weight that is packed in plain torch

# In the order of LinearActivation of packed_linear.h, from 1 on; by the names that configs use.
PACKED_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": gelu,
    "gelu_pytorch_tanh": partial(gelu, approximate="tanh"),
    "quick_gelu": quick_gelu,
}


def pack_weight(weight: torch.Tensor, packing: str) -> torch.Tensor:
    """Pack the weight of a linear layer.

    Args:
        weight: [out_features, in_features], float32, bfloat16 or float16.
        packing: "f32", "bf16" or "f16" round to that dtype; "int8" is symmetric, a scale for 32
            inputs; "int4" has a scale and a minimum for 32 inputs, themselves 8-bit multiples of a
            row's, 4.5 bits a weight; "q4_0", "q4_1", "q5_0", "q5_1", "q4_k", "q5_k" and "q6_k" are
            GGUF's blocks of that name, as "int8" is Q8_0.

    Returns:
        uint8 [packed_bytes].

    Raises:
        TypeError: weight is no tensor, or of another dtype.
        ValueError: weight is not 2-D, or has values that the format cannot hold; packing is not
            known.
    """
    check_packing("pack_weight", packing)
    if use_kernel("pack_weight", weight):
        return _pack_weight(weight, PACKINGS[packing].number)
    _check_pack(weight, 0)
    # Fits take a dozen float32 copies of what is packed at a time.
    rows = max(_VALUES_AT_ONCE // max(weight.shape[1], 1) // LANES, 1) * LANES
    return torch.cat([_pack_rows(part, packing) for part in weight.split(rows)])


def _pack_rows(weight: torch.Tensor, packing: str) -> torch.Tensor:
    packed = pack(weight, packing)
    out_features, in_features = weight.shape
    if not unpack(packed, out_features, in_features, packing).isfinite().all():
        raise ValueError(f"pack_weight: weight has values that {packing} cannot hold")
    return packed


def unpack_weight(
    packed: torch.Tensor,
    out_features: int,
    in_features: int,
    packing: str,
    *,
    rows: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """The dense weight that a packed one stands for, or some of its rows, as an embedding reads it.

    Args:
        packed: uint8, as `pack_weight` returns it.
        out_features, in_features, packing: as it was packed.
        rows: int64 [n], which rows; all by default.
        dtype: of the result.

    Returns:
        [out_features or n, in_features].

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: packed has another size than these features and packing give.
        IndexError: a row that is not there.
    """
    check_packing("unpack_weight", packing)
    number = PACKINGS[packing].number
    if use_kernel("packed_linear", packed):
        try:
            return _unpack_weight(packed, rows, out_features, in_features, number, dtype)
        except ValueError:
            if packed.is_cpu:  # the kernel of a device checks them itself
                _check_indices(rows, out_features)
            raise
    _check_unpack(packed, rows, out_features, in_features, number, dtype)
    _check_indices(rows, out_features)
    dense = unpack(packed, out_features, in_features, packing)
    return (dense if rows is None else dense[rows]).to(dtype)


def packed_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_features: int,
    packing: str,
    activation: str | None = None,
) -> torch.Tensor:
    """activation(x weight' + bias). For inference: `dequantized_linear` has a derivative.

    Beside codes, x is rounded to 8 bits, symmetric, with a scale for 32 inputs. Sums are float32,
    and so is what the activation gets.

    Args:
        x: [..., in_features], float32, bfloat16 or float16.
        weight: uint8, as `pack_weight` returns it.
        bias: [out_features], one of x's dtypes.
        out_features: rows of the weight.
        packing: its format.
        activation: one of PACKED_ACTIVATIONS. Default: none.

    Returns:
        [..., out_features] of x's dtype.

    Raises:
        TypeError: a tensor of another dtype.
        ValueError: weight has another size than these features and packing give; bias is not
            [out_features]; activation is not known.
    """
    check_packing("packed_linear", packing)
    number, applied = PACKINGS[packing].number, _number_of(activation)
    if use_kernel("packed_linear", x):
        return _packed_linear(x, weight, bias, out_features, number, applied)
    _check(x, weight, bias, out_features, number, applied)
    return reference(
        x, weight, bias, out_features=out_features, packing=packing, activation=activation
    )


def reference(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    out_features: int,
    packing: str,
    activation: str | None = None,
) -> torch.Tensor:
    """`packed_linear` in plain torch."""
    dense = unpack(weight, out_features, x.shape[-1], packing)
    values = x.float()
    if PACKINGS[packing].quantized:
        values = _rounded(values)
    y = torch.nn.functional.linear(values, dense, None if bias is None else bias.float())
    return (y if activation is None else PACKED_ACTIVATIONS[activation](y)).to(x.dtype)


def _rounded(x: torch.Tensor) -> torch.Tensor:
    """x as 8-bit codes hold it, with a scale for every group of the last dimension."""
    groups = split_groups(x)
    top = groups.abs().amax(-1, keepdim=True)
    # In float64 the product is exact, and rounded once, as in the kernels. `127 / top` would be
    # 127 times a rounded reciprocal.
    inverse = torch.where(top > 0, torch.full_like(top, 127) / top, 0)
    codes = torch.round(groups.double() * inverse.double())
    codes = codes.nan_to_num().clamp(-127, 127)  # where 127 / top is infinite
    return (codes.float() * (top / 127)).flatten(-2)[..., : x.shape[-1]]


def check_packing(op: str, packing: str, known: Collection[str] = tuple(PACKINGS)) -> None:
    """Raise ValueError unless it is one of the known ones."""
    if packing not in known:
        raise ValueError(f"{op}: packing must be one of {', '.join(known)}, got {packing!r}")


def packing_name(number: int) -> str:
    """The format of a number in the kernels."""
    return list(PACKINGS)[number]


def _check_pack(weight, number) -> None:
    check_tensors("pack_weight", weight=weight)
    if weight.dim() != 2:
        raise ValueError(f"pack_weight: weight must be [out, in], got {list(weight.shape)}")


def check_packed(
    op: str, weight: torch.Tensor, out_features: int, in_features: int, packing: str
) -> None:
    """Raise TypeError or ValueError unless it is such a packed weight."""
    check_tensor(op, "weight", weight)
    if weight.dtype != torch.uint8:
        raise TypeError(
            f"{op}: weight must be uint8, as pack_weight returns it, got {dtype_name(weight)}"
        )
    size = packed_bytes(out_features, in_features, packing)
    if weight.shape != (size,):
        raise ValueError(
            f"{op}: weight must be [{size}], the bytes of {out_features} x {in_features} weights "
            f"as {packing}, got {list(weight.shape)}"
        )
    if not weight.is_contiguous():
        raise ValueError(f"{op}: weight must be contiguous, got strides {weight.stride()}")


def _check_unpack(packed, rows, out_features, in_features, number, dtype) -> None:
    check_packed("unpack_weight", packed, out_features, in_features, packing_name(number))
    if dtype not in FLOAT_DTYPES:
        raise TypeError(f"unpack_weight: dtype must be float32, bfloat16 or float16, got {dtype}")
    if rows is None:
        return
    check_dtype("unpack_weight", "rows", rows, torch.int64)
    if rows.dim() != 1:
        raise ValueError(f"unpack_weight: rows must be [n], got {list(rows.shape)}")
    check_device("unpack_weight", "rows", rows, "weight", packed)


def _check_indices(rows: torch.Tensor | None, out_features: int) -> None:
    if rows is None or not rows.numel() or rows.is_meta:
        return
    low, high = rows.min().item(), rows.max().item()
    if low < 0 or high >= out_features:
        raise IndexError(
            f"unpack_weight: rows must be 0 to {out_features - 1}, got {low if low < 0 else high}"
        )


def _number_of(activation: str | None) -> int:
    """What the kernel takes it as: LinearActivation of packed_linear.h."""
    if activation is None:
        return 0
    if activation not in PACKED_ACTIVATIONS:
        raise ValueError(
            f"packed_linear: activation must be None or one of {', '.join(PACKED_ACTIVATIONS)}, "
            f"got {activation!r}"
        )
    return 1 + list(PACKED_ACTIVATIONS).index(activation)


def check_layer(op: str, x, weight, bias, out_features, number) -> None:
    """Raise TypeError or ValueError unless these are a packed layer and its input."""
    check_tensors(op, optional=("bias",), x=x, bias=bias)
    check_vectors(op, x)
    check_packed(op, weight, out_features, x.shape[-1], packing_name(number))
    check_device(op, "weight", weight, "x", x)
    if bias is not None and bias.shape != (out_features,):
        raise ValueError(f"{op}: bias must be [{out_features}], got {list(bias.shape)}")


def _check(x, weight, bias, out_features, number, activation) -> None:
    check_layer("packed_linear", x, weight, bias, out_features, number)


def _fake(x, weight, bias, out_features, number, activation):
    return x.new_empty((*x.shape[:-1], out_features))


def _pack_fake(weight, number):
    size = packed_bytes(*weight.shape, packing_name(number))
    return weight.new_empty(size, dtype=torch.uint8)


def _unpack_fake(packed, rows, out_features, in_features, number, dtype):
    count = out_features if rows is None else rows.shape[0]
    return packed.new_empty((count, in_features), dtype=dtype)


_packed_linear = register("packed_linear", check=_check, fake=_fake, why="dequantized_linear has")
_pack_weight = register("pack_weight", check=_check_pack, fake=_pack_fake)
_unpack_weight = register("unpack_weight", check=_check_unpack, fake=_unpack_fake)
