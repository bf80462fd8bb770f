"""attention on Llama-3.2-1B's decoder (one query over a long cache, prefill, packed rows),
SigLIP-base's vision encoder, and Llama-3.2-Vision's.

The last attends to the four tiles of an image at once, and has cross-attention from text to them.
Only a few of its heads are used where a call would take a second; one query is the whole layer.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import shapes
from benchmarks.harness import DTYPES, Case, both_directions, measure
from mllama.ops import attention

PEER = "torch's scaled_dot_product_attention (grouped or with repeated heads, whichever is faster)"
CACHE, PREFILLS, WINDOW = 4096, (512, 2048), 512
PACKED = (512, 512, 512, 512)  # sequences of one row
TILES, PATCHES, ROOM = (
    4,
    1601,
    1608,
)  # Llama-3.2-Vision: a tile's patches, and their number after padding


def cases() -> Iterator[Case]:
    """Every shape, dtype and direction. K and V have a cache's layout in decoding, else that of
    the projections.
    """
    heads = (shapes.HEADS, shapes.KV_HEADS, shapes.HEAD_SIZE)
    for dtype in DTYPES:
        yield from _cases("decode", 1, 1, CACHE, *heads, dtype, causal=False)
        yield from _windows(1, CACHE, *heads, dtype)
        for length in PREFILLS:
            yield from _cases("prefill", 1, length, length, *heads, dtype, causal=True)
        yield from _windows(PREFILLS[-1], PREFILLS[-1], *heads, dtype)
        yield from _cases(
            "packed", 1, sum(PACKED), sum(PACKED), *heads, dtype, causal=True, lengths=PACKED
        )
    vision_heads = (
        shapes.VISION_HEADS,
        shapes.VISION_HEADS,
        shapes.VISION_HIDDEN // shapes.VISION_HEADS,
    )
    for batch in shapes.VISION_BATCHES:
        for dtype in DTYPES:
            yield from _cases(
                "encoder", batch, shapes.PATCHES, shapes.PATCHES, *vision_heads, dtype, causal=False
            )
    padded = torch.arange(TILES * ROOM) % ROOM < PATCHES
    tile_hidden = torch.arange(TILES * PATCHES) // PATCHES != 1
    for dtype in DTYPES:
        yield from _cases(
            "tiled encoder",
            1,
            len(padded),
            len(padded),
            2,
            2,
            80,
            dtype,
            causal=False,
            key_mask=padded[None],
        )
        yield from _cases(
            "cross",
            1,
            256,
            len(tile_hidden),
            8,
            2,
            128,
            dtype,
            causal=False,
            key_mask=tile_hidden[None],
        )
        yield from _cases(
            "cross",
            1,
            1,
            len(tile_hidden),
            32,
            8,
            128,
            dtype,
            causal=False,
            key_mask=tile_hidden[None],
        )


def _cases(
    name, batch, queries, keys, heads, kv_heads, size, dtype, causal, key_mask=None, lengths=None
) -> Iterator[Case]:
    q = torch.randn(batch, queries, heads, size, dtype=dtype)
    decode = queries == 1
    if decode:
        k, v = (torch.randn(batch, kv_heads, keys, size, dtype=dtype).transpose(1, 2) for _ in "kv")
    else:
        k, v = (torch.randn(batch, keys, kv_heads, size, dtype=dtype) for _ in "kv")
    pairs = queries * keys if lengths is None else sum(length * length for length in lengths)
    flops = 4 * batch * pairs * heads * size // (2 if causal else 1)
    first_key, mask = (
        _packed(lengths)
        if lengths is not None
        else (None, None if key_mask is None else key_mask[:, None, None])
    )
    both = both_directions(
        f"{name} {batch}x{queries}x{heads}x{size}, {keys} keys x {kv_heads}",
        partial(attention, causal=causal, key_mask=key_mask, first_key=first_key),
        _peer(q, k, v, causal and lengths is None, mask),
        (q, k, v),
        differentiable=3,
        forward_bytes=(2 * q.numel() + 2 * k.numel()) * q.element_size() if decode else 0,
        forward_flops=flops,
        backward_flops=flops * 5 // 2,
    )
    yield from both[:1] if decode else both


def _windows(queries, keys, heads, kv_heads, size, dtype) -> Iterator[Case]:
    """A window of WINDOW keys, without and with a soft cap; the peer has a mask and no cap."""
    q = torch.randn(1, queries, heads, size, dtype=dtype)
    k, v = (torch.randn(1, keys, kv_heads, size, dtype=dtype) for _ in "kv")
    query, key = torch.arange(keys - queries, keys)[:, None], torch.arange(keys)
    mask = ((key <= query) & (key > query - WINDOW))[None, None]  # (1, 1, T, S)
    peer = _peer(q, k, v, False, mask)
    for name, softcap in (("window", None), ("window, softcap", 50.0)):
        both = both_directions(
            f"{name} 1x{queries}x{heads}x{size}, {keys} keys x {kv_heads}",
            partial(attention, causal=True, window=WINDOW, softcap=softcap),
            peer,
            (q, k, v),
            differentiable=3,
        )
        yield from both[:1] if queries == 1 else both


def _packed(lengths: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    """Start of each position's sequence, [1, T], and the same as a causal block-diagonal mask,
    [1, 1, T, T].
    """
    ends = torch.tensor(lengths).cumsum(0)
    first_key = (ends - torch.tensor(lengths)).repeat_interleave(torch.tensor(lengths))[None]
    places = torch.arange(int(ends[-1]))
    return first_key, ((places <= places[:, None]) & (places >= first_key[..., None]))[None]


def _peer(q, k, v, causal, mask):
    """torch's faster way to the same result: grouped heads, or K and V repeated for every query
    head.
    """
    group = q.shape[2] // k.shape[2]

    def grouped(q, k, v):
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))
        return scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=causal, enable_gqa=group > 1
        ).transpose(1, 2)

    def repeated(q, k, v):
        return grouped(q, k.repeat_interleave(group, 2), v.repeat_interleave(group, 2))

    if group == 1:
        return grouped
    contest = Case("", q.dtype, "", partial(grouped, q, k, v), partial(repeated, q, k, v))
    row = measure(contest)
    return grouped if row.ours <= row.peer else repeated
