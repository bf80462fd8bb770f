"""Packed weights in plain torch, written and read in the layout that
csrc/kernels/cpu/packed_linear.h describes. The kernels are tested against it, and it runs without
them.

Here a weight is (blocks, LANES, groups, GROUP): output rows by block and lane, inputs by group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from mllama.ops.packed_codes import BITS, CENTERED, NESTED, SHIFTED, quantize

LANES, GROUP = 16, 32  # output rows side by side; inputs that share a scale


WHOLE_ROW = 2**30  # groups; more than a row has


@dataclass(frozen=True)
class Packing:
    """A format: its number in the kernels, and its bytes for LANES rows.

    Attributes:
        header: bytes before every `span` groups of a block of rows.
        group: bytes of GROUP inputs.
        quantized: weights are codes, and activations are rounded to 8 bits by the group.
        span: groups that share a header.
    """

    number: int
    header: int
    group: int
    quantized: bool
    span: int = WHOLE_ROW

    def headers(self, in_features: int) -> int:
        """How many headers a block of rows has."""
        return -(-max(-(-in_features // GROUP), 1) // self.span)


PACKINGS = {
    "f32": Packing(0, 0, 2048, False),
    "bf16": Packing(1, 0, 1024, False),
    "f16": Packing(2, 0, 1024, False),
    "int8": Packing(3, 0, 544, True),
    "int4": Packing(4, 64, 288, True),
    "q4_0": Packing(5, 0, 288, True),
    "q4_1": Packing(6, 0, 320, True),
    "q5_0": Packing(7, 0, 352, True),
    "q5_1": Packing(8, 0, 384, True),
    "q4_k": Packing(9, 64, 288, True, span=8),
    "q5_k": Packing(10, 64, 352, True, span=8),
    "q6_k": Packing(11, 32, 416, True, span=8),
}
_FLOATS = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16}


def packed_bytes(out_features: int, in_features: int, packing: str) -> int:
    """Size of a packed weight."""
    size = PACKINGS[packing]
    block = size.headers(in_features) * size.header + -(-in_features // GROUP) * size.group
    return -(-out_features // LANES) * block


def split_groups(x: torch.Tensor) -> torch.Tensor:
    """[..., n] -> [..., groups, GROUP], padded with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % GROUP)).unflatten(-1, (-1, GROUP))


def by_lanes(x: torch.Tensor) -> torch.Tensor:
    """[out, ...] -> (blocks, LANES, ...), padded with zeros."""
    padding = (0, 0) * (x.dim() - 1) + (0, -x.shape[0] % LANES)
    return torch.nn.functional.pad(x, padding).unflatten(0, (-1, LANES))


def pack(weight: torch.Tensor, packing: str) -> torch.Tensor:
    """[out, in] -> uint8 [packed_bytes]."""
    w = by_lanes(split_groups(weight.float()))
    if packing in _FLOATS:
        halves = _lanes_inside(w.to(_FLOATS[packing]), 2 if packing == "bf16" else 1)
        return halves.contiguous().view(torch.uint8).flatten()
    return join(*quantize(w, packing, PACKINGS[packing].span), packing)


def unpack(packed: torch.Tensor, out_features: int, in_features: int, packing: str) -> torch.Tensor:
    """uint8 [packed_bytes] -> float32 [out, in]."""
    size, groups = PACKINGS[packing], -(-in_features // GROUP)
    if packing in _FLOATS:
        if packed.storage_offset() % 4:  # view() reads whole numbers of a storage
            packed = packed.clone()
        values = packed.view(-(-out_features // LANES), groups, size.group).view(_FLOATS[packing])
        w = _lanes_outside(values, 2 if packing == "bf16" else 1).float()
    else:
        header, scales, codes = split(packed, out_features, in_features, packing)
        of_group = torch.arange(groups, device=packed.device) // size.span
        header = [value[:, :, of_group] for value in header]
        w = _dequantize(packing, [x.float() for x in header], [x.float() for x in scales], codes)
    return w.flatten(2).flatten(0, 1)[:out_features, :in_features]


def _dequantize(packing, header, scales, codes):
    """Header and scales (blocks, LANES, groups), codes (blocks, LANES, groups, GROUP)."""
    codes = codes.float()
    if packing == "int8":
        return scales[0][..., None] * codes
    if packing == "q6_k":
        step = header[0][..., None] * torch.stack(scales, 3)  # (blocks, LANES, groups, 2)
        return (step[..., None] * (codes - 32).unflatten(3, (2, -1))).flatten(3)
    if packing in CENTERED:
        return scales[0][..., None] * (codes - 2 ** (BITS[packing] - 1))
    if packing in SHIFTED:
        return scales[0][..., None] * codes + scales[1][..., None]
    step, minimum = (of * number for of, number in zip(header, scales, strict=True))
    return step[..., None] * codes - minimum[..., None]


# ---- a weight's numbers: header (blocks, LANES, headers) and scales (blocks, LANES, groups), as
# ---- they are stored, and codes (blocks, LANES, groups, GROUP)

_SCALES = {
    "int8": [torch.float16],
    "q6_k": [torch.int8, torch.int8],
    **dict.fromkeys(CENTERED, [torch.float16]),
    **dict.fromkeys(SHIFTED, [torch.float16, torch.float16]),
    **dict.fromkeys(NESTED, [torch.uint8, torch.uint8]),
}


def join(
    header: Sequence[torch.Tensor],
    scales: Sequence[torch.Tensor],
    codes: torch.Tensor,
    packing: str,
) -> torch.Tensor:
    """Numbers -> uint8 [packed_bytes]."""
    bits, span = BITS[packing], PACKINGS[packing].span
    stored = (
        _lanes_inside(codes.to(torch.int8), 4).view(torch.uint8)
        if bits == 8
        else (_code_bytes(codes.to(torch.uint8), bits))
    )
    groups = torch.cat([*map(_lane_bytes, scales), stored], dim=2)
    if not header:
        return groups.flatten()
    headers = torch.cat([*map(_lane_bytes, header)], dim=2)
    parts: list[torch.Tensor] = []
    for index in range(headers.shape[1]):
        own = groups[:, index * span : (index + 1) * span]
        parts += [headers[:, index], own.flatten(1)]
    return torch.cat(parts, dim=1).flatten()


def split(
    packed: torch.Tensor, out_features: int, in_features: int, packing: str
) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """The inverse: header, scales and codes."""
    size, groups = PACKINGS[packing], -(-in_features // GROUP)
    blocks = packed.view(-(-out_features // LANES), packed_bytes(1, in_features, packing))
    headers, bodies = [], []
    for index in range(size.headers(in_features)):
        start = index * (size.header + size.span * size.group)
        count = min(size.span, groups - index * size.span)
        headers.append(blocks[:, start : start + size.header])
        body = blocks[:, start + size.header :][:, : count * size.group]
        bodies.append(body.unflatten(1, (count, size.group)))
    header = torch.stack(headers, 1).split(2 * LANES, dim=2) if size.header else ()
    body, scales = torch.cat(bodies, 1), []
    for dtype in _SCALES[packing]:
        scales.append(viewed(body[..., : LANES * dtype.itemsize], dtype).transpose(1, 2))
        body = body[..., LANES * dtype.itemsize :]
    bits = BITS[packing]
    codes = _lanes_outside(body.view(torch.int8), 4) if bits == 8 else _codes_of(body, bits)
    return [viewed(part, torch.float16).transpose(1, 2) for part in header], scales, codes


def _lane_bytes(x: torch.Tensor) -> torch.Tensor:
    """(blocks, LANES, n) -> bytes (blocks, n, LANES * itemsize)."""
    return viewed(x.transpose(1, 2), torch.uint8)


def viewed(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The bytes of the last dimension as another dtype; contiguous() may leave an empty tensor's
    strides as they are, which view() refuses.
    """
    return x.clone(memory_format=torch.contiguous_format).view(dtype)


def _lanes_inside(w: torch.Tensor, together: int) -> torch.Tensor:
    """(blocks, LANES, groups, GROUP) -> (blocks, groups, GROUP * LANES), `together` inputs of a
    lane side by side.
    """
    return w.unflatten(3, (-1, together)).permute(0, 2, 3, 1, 4).flatten(2)


def _lanes_outside(values: torch.Tensor, together: int) -> torch.Tensor:
    """The inverse."""
    return values.unflatten(2, (-1, LANES, together)).permute(0, 3, 1, 2, 4).flatten(3)


def _shifts(more: int, device: torch.device) -> torch.Tensor:
    """Where in a byte the upper bits of several codes are."""
    return more * torch.arange(8 // more, dtype=torch.uint8, device=device)[:, None]


def _code_bytes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Nibbles, then what codes have beyond four bits."""
    low, high = (codes & 15).unflatten(3, (-1, 2, 4)).unbind(4)  # (..., GROUP / 8, 4)
    parts = [_lanes_inside((low | high << 4).flatten(3), 4)]
    if more := bits - 4:
        steps = (codes >> 4).unflatten(3, (more, 8 // more, 4))
        shifted = steps << _shifts(more, codes.device)
        parts.append(_lanes_inside(shifted.sum(4, dtype=torch.uint8).flatten(3), 4))
    return torch.cat(parts, dim=2)


def _codes_of(data: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse: bytes (blocks, groups, GROUP * LANES * bits / 8) -> codes."""
    nibbles, upper = data.split([GROUP // 2 * LANES, data.shape[2] - GROUP // 2 * LANES], dim=2)
    pairs = _lanes_outside(nibbles, 4).unflatten(3, (-1, 4))
    codes = torch.stack([pairs & 15, pairs >> 4], dim=4).flatten(3)
    if more := bits - 4:
        words = _lanes_outside(upper, 4).unflatten(3, (more, 1, 4))
        upper = (words >> _shifts(more, data.device)) & (2**more - 1)
        codes = codes | upper.flatten(3) << 4
    return codes
