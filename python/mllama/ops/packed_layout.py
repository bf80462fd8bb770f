"""Packed weights in plain torch, written and read in the layout that
csrc/kernels/cpu/packed_linear.h describes. The kernels are tested against it, and it runs without
them.

Here a weight is (blocks, LANES, groups, GROUP): output rows by block and lane, inputs by group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

LANES, GROUP = 16, 32  # output rows side by side; inputs that share a scale


@dataclass(frozen=True)
class Packing:
    """A format: its number in the kernels, and its bytes for LANES rows.

    Attributes:
        header: bytes at the start of each block of rows.
        group: bytes of GROUP inputs.
        quantized: weights are codes, and activations are rounded to 8 bits by the group.
    """

    number: int
    header: int
    group: int
    quantized: bool


PACKINGS = {
    "f32": Packing(0, 0, 2048, False),
    "bf16": Packing(1, 0, 1024, False),
    "f16": Packing(2, 0, 1024, False),
    "int8": Packing(3, 0, 544, True),
    "int4": Packing(4, 64, 288, True),
    "q4_0": Packing(5, 0, 288, True),
    "q4_1": Packing(6, 0, 320, True),
}
_FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def packed_bytes(out_features: int, in_features: int, packing: str) -> int:
    """Size of a packed weight."""
    size = PACKINGS[packing]
    return -(-out_features // LANES) * (size.header + -(-in_features // GROUP) * size.group)


def split_groups(x: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., groups, GROUP], padded with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))


def pack(weight: torch.Tensor, packing: str) -> torch.Tensor:
    """[out, in] -> uint8 [packed_bytes]."""
    rows = torch.nn.functional.pad(weight.float(), (0, 0, 0, -weight.shape[0] % LANES))
    w = split_groups(rows).unflatten(0, (-1, LANES))
    if packing in _FLOATS:
        halves = _lanes_inside(w.to(_FLOATS[packing]), 2 if packing == "bf16" else 1)
        return halves.contiguous().view(torch.uint8).flatten()
    return assemble(packing, *_QUANTIZERS[packing](w))


def assemble(
    packing: str,
    header: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    codes: torch.Tensor,
) -> torch.Tensor:
    """The bytes of codes and scales.

    Args:
        packing: a quantized format.
        header: the blocks' values, (blocks, LANES) each, in their dtypes in the format.
        scales: the groups' values, (blocks, LANES, groups) each, in theirs.
        codes: (blocks, LANES, groups, GROUP).

    Returns:
        uint8 [packed_bytes].
    """
    codes = _code_bytes(codes) if packing == "int8" else _nibble_bytes(codes)
    groups = torch.cat([*(_bytes_of(scale.transpose(1, 2)) for scale in scales), codes], dim=2)
    headers = [_bytes_of(value) for value in header]
    return torch.cat([*headers, groups.flatten(1)], dim=1).flatten()


def int4_scales(packed: torch.Tensor, out_features: int, in_features: int) -> list[torch.Tensor]:
    """What `assemble` takes beside codes for "int4", of a packed weight: d and e float16 (blocks,
    LANES), s and m uint8 (blocks, LANES, groups).
    """
    size, groups = PACKINGS["int4"], -(-in_features // GROUP)
    blocks = packed.view(-(-out_features // LANES), size.header + groups * size.group)
    d, e = blocks[:, : size.header].contiguous().view(torch.float16).split(LANES, dim=1)
    body = blocks[:, size.header :].unflatten(1, (groups, size.group))
    s, m = body[..., : 2 * LANES].split(LANES, dim=2)
    return [d, e, s.transpose(1, 2), m.transpose(1, 2)]


def unpack(packed: torch.Tensor, out_features: int, in_features: int, packing: str) -> torch.Tensor:
    """uint8 [packed_bytes] -> float32 [out, in]."""
    size = PACKINGS[packing]
    groups = -(-in_features // GROUP)
    blocks = packed.view(-(-out_features // LANES), size.header + groups * size.group)
    header = blocks[:, : size.header]
    body = blocks[:, size.header :].unflatten(1, (groups, size.group))  # (blocks, groups, bytes)
    if packing in _FLOATS:
        values = body.contiguous().view(_FLOATS[packing])
        w = _lanes_outside(values, 2 if packing == "bf16" else 1).float()
    else:
        w = _DEQUANTIZERS[packing](header, body)
    return w.flatten(2).flatten(0, 1)[:out_features, :in_features]


# ---- the order of elements


def _lanes_inside(w: torch.Tensor, together: int) -> torch.Tensor:
    """(blocks, LANES, groups, GROUP) -> (blocks, groups, GROUP * LANES), `together` inputs of a
    lane side by side.
    """
    return w.unflatten(3, (-1, together)).permute(0, 2, 3, 1, 4).flatten(2)


def _lanes_outside(values: torch.Tensor, together: int) -> torch.Tensor:
    """The inverse."""
    return values.unflatten(2, (-1, LANES, together)).permute(0, 3, 1, 2, 4).flatten(3)


def _code_bytes(codes: torch.Tensor) -> torch.Tensor:
    return _lanes_inside(codes.to(torch.int8), 4).view(torch.uint8)


def _nibble_bytes(codes: torch.Tensor) -> torch.Tensor:
    low, high = codes.to(torch.uint8).unflatten(3, (-1, 2, 4)).unbind(4)  # (..., GROUP / 8, 4)
    return _lanes_inside((low | high << 4).flatten(3), 4)


def _nibbles(data: torch.Tensor) -> torch.Tensor:
    """(blocks, groups, GROUP * LANES / 2) -> codes (blocks, LANES, groups, GROUP)."""
    pairs = _lanes_outside(data, 4).unflatten(3, (-1, 4))
    return torch.stack([pairs & 15, pairs >> 4], dim=4).flatten(3).float()


def _bytes_of(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def _halves(data: torch.Tensor) -> torch.Tensor:
    """f16 of a group's or a block's lanes as float32."""
    return data.contiguous().view(torch.float16).float()


# ---- quantizers: (header, scales of the groups, codes)


def _quantize_int8(w):
    scale = (w.abs().amax(3) / 127).half()
    return (), (scale,), torch.round(w * _inverse(scale)[..., None]).clamp(-127, 127)


def _quantize_q4_0(w):
    """The value of largest size becomes -8."""
    top = w.gather(3, w.abs().argmax(3, keepdim=True))[..., 0]
    scale = (top / -8).half()
    return (), (scale,), torch.round(w * _inverse(scale)[..., None] + 8).clamp(0, 15)


def _quantize_q4_1(w):
    low = w.amin(3)
    scale, low = ((w.amax(3) - low) / 15).half(), low.half()
    codes = torch.round((w - low.float()[..., None]) * _inverse(scale)[..., None]).clamp(0, 15)
    return (), (scale, low), codes


def _quantize_int4(w):
    """The groups' scales and minima as 8 bits of the row's largest ones."""
    scale, minimum = fit_nibbles(w)
    largest = (torch.nn.functional.pad(value, (0, 1)).amax(2) for value in (scale, -minimum))
    rows = [_half_above(value / 255) for value in largest]  # (blocks, LANES); 0 without inputs
    inverse = [_inverse(row)[..., None] for row in rows]
    s = torch.round(scale * inverse[0]).clamp(0, 255)
    m = torch.round(-minimum * inverse[1]).clamp(0, 255)
    step, shift = (row.float()[..., None] * codes for row, codes in zip(rows, (s, m), strict=True))
    codes = torch.round((w + shift[..., None]) * _inverse(step)[..., None]).clamp(0, 15)
    return rows, (s.to(torch.uint8), m.to(torch.uint8)), codes


def _half_above(x: torch.Tensor) -> torch.Tensor:
    """Not below x, so that 8-bit multiples reach what x is of, where float16 has few digits too."""
    half = x.half()
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < x, above, half)


def fit_nibbles(
    w: torch.Tensor, importance: torch.Tensor | float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of every group's four-bit codes, of least squared error among the range of
    its values and others a little wider or narrower, each refitted. The minimum is at most zero.

    Args:
        w: [..., GROUP].
        importance: factors on the squared errors, [..., GROUP] or one for all.
    """
    low, high = w.amin(-1).clamp(max=0), w.amax(-1)
    spread = (high - low).clamp(min=0)
    best, error = (spread / 15, low), _squared_error(w, spread / 15, low, importance)
    for step in range(-4, 9):
        scale, minimum = _refit(w, spread / (15 + 0.25 * step), low, importance)
        found = _squared_error(w, scale, minimum, importance)
        better = (found < error) & (spread > 0)
        best = torch.where(better, scale, best[0]), torch.where(better, minimum, best[1])
        error = torch.where(better, found, error)
    return best


def _refit(w, scale, minimum, importance):
    """By least squares, for the codes that these give."""
    q = _codes(w, scale, minimum)
    n, sum_q, sum_qq, sum_w, sum_qw = (
        (importance * x).sum(-1) for x in (torch.ones_like(w), q, q * q, w, q * w)
    )
    determinant = n * sum_qq - sum_q * sum_q
    new_scale = (n * sum_qw - sum_q * sum_w) / determinant
    new_minimum = (sum_qq * sum_w - sum_q * sum_qw) / determinant
    positive = new_minimum > 0
    new_scale = torch.where(positive, sum_qw / sum_qq, new_scale)
    valid = (determinant > 0) & (new_scale > 0)
    return (
        torch.where(valid, new_scale, scale),
        torch.where(valid, new_minimum.clamp(max=0), minimum),
    )


def _codes(w, scale, minimum):
    return torch.round(((w - minimum[..., None]) * _inverse(scale)[..., None]).clamp(0, 15))


def _squared_error(w, scale, minimum, importance):
    values = scale[..., None] * _codes(w, scale, minimum) + minimum[..., None]
    return (importance * (values - w).square()).sum(-1)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale in float32, 0 for 0."""
    return torch.where(scale != 0, 1 / scale.float(), 0)


_QUANTIZERS = {
    "int8": _quantize_int8,
    "int4": _quantize_int4,
    "q4_0": _quantize_q4_0,
    "q4_1": _quantize_q4_1,
}


# ---- and back: header (blocks, bytes) and body (blocks, groups, bytes) -> weights


def _by_lane(values: torch.Tensor) -> torch.Tensor:
    """(blocks, groups, LANES) -> (blocks, LANES, groups, 1)."""
    return values.transpose(1, 2)[..., None]


def _dequantize_int8(header, body):
    scale, codes = body[..., : 2 * LANES], body[..., 2 * LANES :]
    return _by_lane(_halves(scale)) * _lanes_outside(codes.view(torch.int8), 4).float()


def _dequantize_int4(header, body):
    d, e = (_halves(part)[:, :, None] for part in header.split(2 * LANES, dim=1))
    s, m, codes = body.split([LANES, LANES, body.shape[2] - 2 * LANES], dim=2)
    scale = d * s.transpose(1, 2).float()  # (blocks, LANES, groups)
    minimum = e * m.transpose(1, 2).float()
    return scale[..., None] * _nibbles(codes) - minimum[..., None]


def _dequantize_q4_0(header, body):
    return _by_lane(_halves(body[..., : 2 * LANES])) * (_nibbles(body[..., 2 * LANES :]) - 8)


def _dequantize_q4_1(header, body):
    scale, minimum = (
        _by_lane(_halves(body[..., start : start + 2 * LANES])) for start in (0, 2 * LANES)
    )
    return scale * _nibbles(body[..., 4 * LANES :]) + minimum


_DEQUANTIZERS = {
    "int8": _dequantize_int8,
    "int4": _dequantize_int4,
    "q4_0": _dequantize_q4_0,
    "q4_1": _dequantize_q4_1,
}
