"""Blocks of GGUF files as packed weights, and back, bit for bit. The layout of a block is
llama.cpp's (ggml-common.h).
"""

import torch

from mllama.ops._dispatch import check_dtype, register, use_kernel
from mllama.ops.packed_codes import BITS, CENTERED, SHIFTED
from mllama.ops.packed_layout import GROUP, PACKINGS, by_lanes, join, packed_bytes, split, viewed
from mllama.ops.packed_linear import check_packing

# Inputs and bytes of a block, by the format that holds it.
GGUF_BLOCKS = {
    "int8": (32, 34),
    "q4_0": (32, 18),
    "q4_1": (32, 20),
    "q5_0": (32, 22),
    "q5_1": (32, 24),
    "q4_k": (256, 144),
    "q5_k": (256, 176),
    "q6_k": (256, 210),
}


def pack_gguf(blocks: torch.Tensor, packing: str) -> torch.Tensor:
    """Pack rows of GGUF blocks as they are.

    Args:
        blocks: uint8 [out_features, bytes of a row].
        packing: one of GGUF_BLOCKS: "int8" for Q8_0, else the blocks' own name, as "q4_k".

    Returns:
        uint8 [packed_bytes], as `pack_weight` returns it.

    Raises:
        TypeError: blocks is no uint8 tensor.
        ValueError: blocks is not 2-D, its rows are no whole blocks, or a block's scale is not
            finite; packing is not known.
    """
    check_packing("pack_gguf", packing, GGUF_BLOCKS)
    if use_kernel("pack_gguf", blocks):
        return _pack_gguf(blocks, PACKINGS[packing].number)
    _check(blocks, PACKINGS[packing].number)
    return reference(blocks, packing)


def reference(blocks: torch.Tensor, packing: str) -> torch.Tensor:
    """`pack_gguf` in plain torch."""
    _, size = GGUF_BLOCKS[packing]
    rows = blocks.unflatten(1, (blocks.shape[1] // size, size))
    read = _READERS.get(packing, _read_simple)
    header, scales, codes = read(by_lanes(rows), packing)
    if not all(values.isfinite().all() for values in (*header, *scales)):
        raise ValueError("pack_gguf: blocks: they have scales that are not finite")
    return join(header, scales, codes, packing)


def unpack_gguf(
    packed: torch.Tensor, out_features: int, in_features: int, packing: str
) -> torch.Tensor:
    """The inverse of `pack_gguf`, in plain torch.

    Args:
        packed: uint8, as `pack_weight` or `pack_gguf` returns it.
        out_features, in_features: as it was packed; whole blocks of inputs.
        packing: one of GGUF_BLOCKS.

    Returns:
        uint8 [out_features, bytes of a row].
    """
    check_packing("unpack_gguf", packing, GGUF_BLOCKS)
    inputs, _ = GGUF_BLOCKS[packing]
    if in_features % inputs:
        raise ValueError(
            f"unpack_gguf: in_features must be a multiple of {inputs}, got {in_features}"
        )
    size = packed_bytes(out_features, in_features, packing)
    if packed.shape != (size,):
        raise ValueError(f"unpack_gguf: packed must be [{size}], got {list(packed.shape)}")
    numbers = split(packed.contiguous(), out_features, in_features, packing)
    blocks = _WRITERS.get(packing, _write_simple)(*numbers, packing)
    return blocks.flatten(2).flatten(0, 1)[:out_features]


# ---- blocks (..., bytes) -> header, scales and codes (packed_layout.join), and back


def _read_simple(blocks, packing):
    """One or two f16 numbers, fifth bits, codes."""
    count = 2 if packing in SHIFTED else 1
    scales, data = blocks[..., : 2 * count], blocks[..., 2 * count :]
    bits = BITS[packing]
    if bits == 8:
        codes = data.view(torch.int8)
    else:
        codes = _low_high(data[..., -GROUP // 2 :])
        if bits == 5:
            codes = codes | _bits(data[..., :4]).flatten(-2) << 4
    return [], list(_numbers(scales)), codes


def _write_simple(header, scales, codes, packing):
    parts = [_bytes(scale) for scale in scales]
    if packing not in CENTERED and packing not in SHIFTED:
        return torch.cat([*parts, viewed(codes, torch.uint8)], -1)
    if BITS[packing] == 5:
        parts.append(_packed_bits((codes >> 4).unflatten(-1, (-1, 8))))
    return torch.cat([*parts, _joined(codes & 15)], -1)


def _read_nested(blocks, packing):
    """Two f16 numbers, six bits of 8 scales and of 8 minima, a plane of fifth bits, codes."""
    numbers, six, data = blocks.split([4, 12, blocks.shape[-1] - 16], -1)
    first, second, both = six.split(4, -1)
    s = torch.cat([first & 63, both & 15 | first >> 6 << 4], -1)
    m = torch.cat([second & 63, both >> 4 | second >> 6 << 4], -1)
    codes = _low_high(data[..., -128:].unflatten(-1, (4, GROUP))).unflatten(-1, (2, GROUP))
    codes = codes.flatten(-3, -2)  # (..., 8, GROUP)
    if BITS[packing] == 5:
        codes = codes | _bits(data[..., :GROUP]).transpose(-1, -2) << 4
    return list(_numbers(numbers)), [s.flatten(2), m.flatten(2)], codes.flatten(2, 3)


def _write_nested(header, scales, codes, packing):
    s, m = (scale.unflatten(2, (-1, 8)) for scale in scales)
    first, second = (x[..., :4] | x[..., 4:] >> 4 << 6 for x in (s, m))
    both = s[..., 4:] & 15 | m[..., 4:] << 4
    parts = [*map(_bytes, header), first, second, both]
    codes = codes.unflatten(2, (-1, 8))  # (..., 8, GROUP)
    if BITS[packing] == 5:
        parts.append(_packed_bits((codes >> 4).transpose(-1, -2)))
    pairs = (codes & 15).unflatten(3, (4, 2)).flatten(-2)
    return torch.cat([*parts, _joined(pairs).flatten(-2)], -1)


def _read_q6_k(blocks, packing):
    """Four low bits, a plane of the upper two, 16 scales, an f16 number; halves of 128 inputs."""
    low, upper, s, d = blocks.split([128, 64, 16, 2], -1)
    low = _low_high(low.unflatten(-1, (2, 64))).unflatten(-1, (4, GROUP))  # (..., 2, 4, GROUP)
    shifts = _places(2, upper.device)[:, None]
    upper = upper.unflatten(-1, (2, 1, GROUP)) >> shifts & 3
    codes = (low | upper << 4).flatten(-3, -2)
    halves = viewed(s, torch.int8).unflatten(-1, (8, 2)).flatten(2, 3)
    return list(_numbers(d)), list(halves.unbind(-1)), codes.flatten(2, 3)


def _write_q6_k(header, scales, codes, packing):
    codes = codes.unflatten(2, (-1, 2, 4))  # (..., 2, 4, GROUP)
    low = _joined((codes & 15).flatten(-2))
    shifts = _places(2, codes.device)[:, None]
    upper = (codes >> 4 << shifts).sum(-2, dtype=torch.uint8)
    s = torch.stack([scale.unflatten(2, (-1, 8)) for scale in scales], -1).view(torch.uint8)
    return torch.cat([low.flatten(-2), upper.flatten(-2), s.flatten(-2), _bytes(header[0])], -1)


_READERS = {"q4_k": _read_nested, "q5_k": _read_nested, "q6_k": _read_q6_k}
_WRITERS = {"q4_k": _write_nested, "q5_k": _write_nested, "q6_k": _write_q6_k}


def _numbers(data: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """f16 numbers of bytes."""
    return viewed(data, torch.float16).unbind(-1)


def _bytes(number: torch.Tensor) -> torch.Tensor:
    return viewed(number[..., None], torch.uint8)


def _low_high(data: torch.Tensor) -> torch.Tensor:
    """The low halves of n bytes, then the high ones: (..., n) -> (..., 2 * n)."""
    return torch.cat([data & 15, data >> 4], -1)


def _joined(codes: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def _places(step: int, device: torch.device) -> torch.Tensor:
    """Every `step`-th bit of a byte."""
    return torch.arange(0, 8, step, dtype=torch.uint8, device=device)


def _bits(data: torch.Tensor) -> torch.Tensor:
    """(...) -> (..., 8), the lowest first."""
    return data[..., None] >> _places(1, data.device) & 1


def _packed_bits(bits: torch.Tensor) -> torch.Tensor:
    """The inverse."""
    return (bits << _places(1, bits.device)).sum(-1, dtype=torch.uint8)


# ---- the operator


def _check(blocks, number) -> None:
    check_dtype("pack_gguf", "blocks", blocks, torch.uint8)
    packing = list(PACKINGS)[number]
    _, size = GGUF_BLOCKS[packing]
    if blocks.dim() != 2 or blocks.shape[1] % size:
        raise ValueError(
            f"pack_gguf: blocks must be [out, n * {size}], whole blocks of {packing}, got "
            f"{list(blocks.shape)}"
        )


def _fake(blocks, number):
    packing = list(PACKINGS)[number]
    inputs, size = GGUF_BLOCKS[packing]
    in_features = blocks.shape[1] // size * inputs
    return blocks.new_empty(packed_bytes(blocks.shape[0], in_features, packing))


_pack_gguf = register("pack_gguf", check=_check, fake=_fake)
