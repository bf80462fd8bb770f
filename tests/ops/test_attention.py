import itertools
import math

import pytest
import torch
from transformers.masking_utils import (
    blockwise_overlay,
    eager_mask,
    or_masks,
    sdpa_mask,
    sliding_window_causal_mask_function,
)
from transformers.models.gemma2 import modeling_gemma2

import devices
from helpers import (
    THROWN,
    BadCall,
    Sample,
    assert_close,
    check_op,
    instruction_set,
    instruction_sets,
    needs_kernels,
)
from mllama import _ext
from mllama.ops import attention, attention_weights
from mllama.ops.attention import reference

torch.manual_seed(0)
# P and dS are rounded to the inputs' dtype where the CPU multiplies bf16, so a sum of many small
# errors remains.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def tensors(batch=1, queries=1, keys=1, heads=2, kv_heads=1, size=16):
    return (
        torch.randn(batch, queries, heads, size),
        torch.randn(batch, keys, kv_heads, size),
        torch.randn(batch, keys, kv_heads, size),
    )


def left_padding(*lengths, keys):
    return torch.arange(keys) >= keys - torch.tensor(lengths)[:, None]


def right_padding(*lengths, keys):
    return torch.arange(keys) < torch.tensor(lengths)[:, None]


def starts(*lengths):
    """[B, T]: for rows of sequences of these lengths, where each position's sequence begins."""
    rows = [
        [
            start
            for start, size in zip(itertools.accumulate(row, initial=0), row, strict=False)
            for _ in range(size)
        ]
        for row in lengths
    ]
    return torch.tensor(rows)


def sample(*args, **masks):
    return Sample(tensors(*args), masks)


# Up to 24 rows (queries x query heads per key head) run on the decode kernel, more on the prefill
# kernel.
SAMPLES = {
    "causal, grouped": sample(2, 21, 21, 4, 2, 24, causal=True),
    "one query over two chunks of keys": sample(
        2, 1, 300, 6, 2, 64, causal=True, key_mask=left_padding(300, 130, keys=300)
    ),
    "no mask, several tiles and blocks": sample(1, 150, 140, 2, 2, 40),
    "odd size, rows that see nothing": sample(2, 30, 12, 3, 3, 17, causal=True),
    "int offset, cache longer than what is visible": sample(
        1, 20, 150, 4, 1, 32, causal=True, query_offset=70
    ),
    "offset without dimensions": sample(
        2, 3, 40, 4, 2, 33, causal=True, query_offset=torch.tensor(5)
    ),
    "offset of one element": sample(
        2, 3, 40, 4, 2, 33, causal=True, query_offset=torch.tensor([5]), scale=0.3
    ),
    "offset per row, one beyond the keys": sample(
        3, 30, 40, 2, 2, 16, causal=True, query_offset=torch.tensor([-7, 3, 1 << 62])
    ),
    "left padding": sample(2, 26, 26, 4, 4, 16, causal=True, key_mask=left_padding(5, 26, keys=26)),
    "right padding": sample(2, 18, 70, 2, 1, 16, key_mask=right_padding(9, 0, keys=70)),
    "holes": sample(2, 27, 33, 2, 2, 16, key_mask=torch.rand(2, 33) > 0.5),
    "prefix": sample(3, 24, 24, 2, 1, 16, causal=True, prefix_length=torch.tensor([0, 10, 1000])),
    "bias for all rows, one key hidden": sample(
        2, 28, 9, 2, 2, 16, key_bias=torch.tensor([[0.0, 1, -2, 3, -math.inf, 0, 5, -1, 2]])
    ),
    "everything": sample(
        2,
        25,
        60,
        6,
        2,
        72,
        causal=True,
        query_offset=torch.tensor([30, 10]),
        key_mask=left_padding(50, 60, keys=60),
        key_bias=torch.randn(2, 60),
        prefix_length=torch.tensor([15, 12]),
    ),
    "everything, few rows": sample(
        2,
        2,
        60,
        6,
        2,
        72,
        causal=True,
        query_offset=torch.tensor([30, 10]),
        key_mask=left_padding(50, 60, keys=60),
        key_bias=torch.randn(2, 60),
        prefix_length=torch.tensor([15, 12]),
    ),
    "holes, one row": sample(2, 1, 70, 2, 2, 16, key_mask=torch.rand(2, 70) > 0.5),
    "chunks of keys for the gradients": sample(
        2, 60, 1100, 2, 1, 250, causal=True, query_offset=torch.tensor([490, 1039])
    ),
    "small heads": sample(2, 21, 30, 4, 2, 8, causal=True, key_mask=left_padding(30, 26, keys=30)),
    "smallest heads, scaled": sample(1, 2, 5, 2, 1, 1, scale=0.7, key_bias=torch.randn(1, 5)),
    "largest size": sample(1, 26, 26, 2, 2, 256, causal=True),
    "several sequences in a row": sample(
        2, 150, 150, 4, 2, 24, causal=True, first_key=starts([70, 1, 79], [3, 147])
    ),
    "several sequences, the same in all rows": sample(
        2, 30, 30, 2, 2, 33, causal=True, first_key=starts([17, 13])
    ),
    "several sequences, few queries": sample(
        2, 5, 5, 2, 1, 16, causal=True, first_key=starts([2, 3], [5])
    ),
    "several sequences over chunks of keys": sample(
        1, 1100, 1100, 2, 1, 250, causal=True, first_key=starts([400, 690, 10])
    ),
    "several sequences, each with its prefix": sample(
        1,
        40,
        40,
        2,
        1,
        16,
        causal=True,
        first_key=starts([22, 18]),
        prefix_length=torch.tensor([[9] * 22 + [33] * 18]),
        key_mask=torch.rand(1, 40) > 0.2,
    ),
    "starts in any order, beyond all bounds": sample(
        2,
        30,
        50,
        4,
        2,
        16,
        causal=True,
        query_offset=torch.tensor([15, 40]),
        first_key=torch.randint(-9, 60, (2, 30)),
        prefix_length=torch.randint(-9, 60, (2, 30)),
        key_mask=left_padding(40, 50, keys=50),
        key_bias=torch.randn(2, 50),
    ),
    "starts without causality": sample(
        1, 30, 20, 2, 1, 16, first_key=torch.tensor([[1 << 40] + [-(1 << 40)] + [7] * 28])
    ),
    "small heads, two sequences": sample(
        1, 21, 21, 4, 2, 8, causal=True, first_key=starts([8, 13])
    ),
    "window, several tiles and blocks": sample(2, 210, 210, 4, 2, 24, causal=True, window=37),
    "window over chunks of keys, one query": sample(
        2, 1, 900, 6, 2, 64, causal=True, window=300, key_mask=left_padding(900, 130, keys=900)
    ),
    "window, few queries, the last one in a new chunk": sample(
        2, 3, 600, 4, 2, 24, causal=True, window=87, query_offset=torch.tensor([340, 2])
    ),
    "window over chunks of keys for the gradients": sample(
        1, 600, 1100, 2, 1, 250, causal=True, window=100, query_offset=490
    ),
    "window of one key": sample(1, 5, 9, 2, 2, 16, causal=True, window=1),
    "window wider than all keys": sample(1, 30, 30, 2, 1, 16, causal=True, window=1 << 40),
    "window, offsets beyond the keys": sample(
        4,
        30,
        40,
        2,
        2,
        16,
        causal=True,
        window=6,
        query_offset=torch.tensor([-7, 41, 1 << 62, -(1 << 62)]),
        prefix_length=torch.tensor([3, 40, 40, 3]),
    ),
    "window beside a prefix": sample(
        3, 30, 30, 2, 1, 16, causal=True, window=4, prefix_length=torch.tensor([0, 10, 1000])
    ),
    "window beside a prefix, few queries": sample(
        3, 4, 24, 2, 1, 16, causal=True, window=3, prefix_length=torch.tensor([0, 22, 1000])
    ),
    "window, several sequences with prefixes": sample(
        2,
        60,
        60,
        2,
        1,
        16,
        causal=True,
        window=7,
        first_key=starts([22, 38], [59, 1]),
        prefix_length=torch.tensor([[9] * 22 + [33] * 38, [20] * 59 + [0]]),
        key_mask=torch.rand(2, 60) > 0.2,
    ),
    # Queries in the prefix see all of it, behind the last key that padding leaves, and behind all.
    "window, prefixes of queries that end in padding": sample(
        2,
        30,
        30,
        2,
        1,
        16,
        causal=True,
        window=3,
        prefix_length=torch.tensor([[9] * 30, [25] * 30]),
        key_mask=right_padding(6, 20, keys=30),
    ),
    "window, queries behind the keys in and behind a prefix": sample(
        4,
        30,
        20,
        2,
        1,
        16,
        causal=True,
        window=3,
        query_offset=torch.tensor([10, 15, 1000, 1 << 62]),
        prefix_length=torch.tensor([35, 20, 1010, 99]),
    ),
    "softcap": sample(2, 40, 70, 4, 2, 40, causal=True, softcap=0.8, scale=0.5),
    "softcap, few queries": sample(2, 2, 300, 4, 2, 40, softcap=0.8, key_bias=torch.randn(2, 300)),
    "softcap beside everything": sample(
        2,
        26,
        60,
        6,
        2,
        72,
        causal=True,
        window=20,
        query_offset=torch.tensor([30, 10]),
        key_mask=left_padding(50, 60, keys=60),
        key_bias=torch.randn(2, 60),
        prefix_length=torch.tensor([35, 12]),
        softcap=1.5,
    ),
    "softcap far above and far below the scores": sample(1, 26, 30, 2, 2, 24, softcap=1e9),
    "softcap of small heads, no scale": sample(1, 20, 30, 2, 2, 8, softcap=2.0, scale=0.0),
    "no keys": sample(1, 2, 0, 2, 1, 16),
    "no queries": sample(1, 0, 3, 2, 1, 16, causal=True, window=2),
    "no queries, prefixes": sample(
        1, 0, 3, 2, 1, 16, causal=True, prefix_length=torch.zeros(1, 0, dtype=torch.int64)
    ),
    "no rows": sample(0, 2, 3, 2, 1, 16, key_mask=torch.ones(0, 3, dtype=torch.bool)),
    "no rows, prefix": sample(
        0, 2, 3, 2, 1, 16, causal=True, prefix_length=torch.empty(0, dtype=torch.int64)
    ),
}
# What replaces them in the emulator, which would take minutes: fewer queries and keys, since tiles
# of CUDA kernels, up to 64 keys, are smaller than the CPU's chunks of 128 to 500.
SMALLER = {
    "no mask, several tiles and blocks": sample(1, 70, 70, 2, 2, 40),
    "chunks of keys for the gradients": sample(
        2, 20, 140, 2, 1, 250, causal=True, query_offset=torch.tensor([50, 119])
    ),
    "several sequences in a row": sample(
        2, 70, 70, 4, 2, 24, causal=True, first_key=starts([30, 1, 39], [3, 67])
    ),
    "several sequences over chunks of keys": sample(
        1, 70, 70, 2, 1, 250, causal=True, first_key=starts([28, 37, 5])
    ),
    "window, several tiles and blocks": sample(1, 90, 90, 4, 2, 24, causal=True, window=37),
    "window over chunks of keys, one query": sample(
        2, 1, 400, 6, 2, 64, causal=True, window=200, key_mask=left_padding(400, 60, keys=400)
    ),
    "window over chunks of keys for the gradients": sample(
        1, 50, 120, 2, 1, 250, causal=True, window=40, query_offset=60
    ),
}
assert SMALLER.keys() <= SAMPLES.keys()
if devices.is_emulated():
    SAMPLES |= SMALLER

Q, K, V = tensors(2, 4, 6, 4, 2, 16)
OFFSET, MASK, BIAS, FIRST = (
    torch.tensor([2]),
    right_padding(6, 3, keys=6),
    torch.zeros(1, 6),
    starts([1, 3]),
)


def raw(requires_grad):
    q, k, v = (tensor.clone().requires_grad_(requires_grad) for tensor in (Q, K, V))
    return (q, k, v, MASK, BIAS, OFFSET, None, FIRST, True, 3, None, 5.0)


@needs_kernels
def test_attention():
    operators = torch.ops.mllama
    out, statistics = operators.attention(*raw(False))
    check_op(
        attention,
        reference,
        list(SAMPLES.values()),
        keep_float32=("key_bias",),
        differentiable=(0, 1, 2),
        tolerance=TOLERANCE,
        raw=[
            (operators.attention.default, raw(True)),
            (
                operators._attention_backward.default,
                (torch.randn_like(out), Q, K, V, out, statistics, *raw(False)[3:]),
            ),
        ],
        bad_calls=BAD_CALLS,
    )


BAD_CALLS = [
    BadCall(lambda: attention(1, K, V), TypeError, "q must be a torch.Tensor, got int"),
    BadCall(
        lambda: attention(Q, K, V.double()),
        TypeError,
        "v must be float32, bfloat16 or float16, got float64",
    ),
    BadCall(lambda: attention(Q, K, None), TypeError, "v must be a torch.Tensor, got NoneType"),
    BadCall(
        lambda: attention(Q, K.half(), V), TypeError, "k must have q's dtype float32, got float16"
    ),
    BadCall(
        lambda: attention(Q[0], K, V),
        ValueError,
        r"q and k must be \[batch, length, heads, head size\]",
    ),
    BadCall(
        lambda: attention(Q[..., :0], K[..., :0], V[..., :0]),
        ValueError,
        "head size .* must be 1 to 256, got 0",
    ),
    BadCall(
        lambda: attention(*tensors(1, 2, 2, 1, 1, 257)),
        ValueError,
        "head size .* must be 1 to 256, got 257",
    ),
    BadCall(
        lambda: attention(Q[..., :8], K[:1, ..., :8], V[..., :8]), ValueError, "must agree in batch"
    ),
    BadCall(lambda: attention(Q, K[:1], V), ValueError, "must agree in batch"),
    BadCall(
        lambda: attention(Q[:, :, :3], K, V), ValueError, "q's 3 heads must be a multiple of k's 2"
    ),
    BadCall(
        lambda: attention(Q, K[:, :, :0], V[:, :, :0]),
        ValueError,
        "q's 4 heads must be a multiple of k's 0",
    ),
    BadCall(lambda: attention(Q, K, V[:, :3]), ValueError, "v must have k's shape"),
    BadCall(
        lambda: attention(Q, K, V, scale="1"), TypeError, "scale must be a float or None, got str"
    ),
    BadCall(lambda: attention(Q, K, V, softcap="1"), TypeError, "softcap"),
    BadCall(lambda: attention(Q, K, V, softcap=True), TypeError, "softcap"),
    *(
        BadCall(lambda c=c: attention(Q, K, V, softcap=c), ValueError, "softcap")
        for c in (0, 0.0, -1.0, math.inf, math.nan, 1e300)
    ),
    BadCall(lambda: attention(Q, K, V, window=3), ValueError, "window has a meaning only with"),
    BadCall(lambda: attention(Q, K, V, causal=True, window=0), ValueError, "window"),
    BadCall(lambda: attention(Q, K, V, causal=True, window=1 << 62), ValueError, "window"),
    BadCall(lambda: attention(Q, K, V, causal=True, window=2.0), TypeError, "window"),
    BadCall(lambda: attention(Q, K, V, causal=True, window=True), TypeError, "window"),
    BadCall(lambda: attention(Q, K, V, causal=1), TypeError, "causal must be a bool, got int"),
    BadCall(
        lambda: attention(Q, K, V, query_offset=3),
        ValueError,
        "query_offset has a meaning only with causal=True",
    ),
    BadCall(
        lambda: attention(Q, K, V, prefix_length=OFFSET),
        ValueError,
        "prefix_length has a meaning only with causal=True",
    ),
    BadCall(
        lambda: attention(Q, K, V, causal=True, query_offset=1.5),
        TypeError,
        "query_offset must be an int, an int64 tensor or None",
    ),
    BadCall(
        lambda: attention(Q, K, V, causal=True, query_offset=1 << 70),
        ValueError,
        "query_offset must lie within",
    ),
    BadCall(
        lambda: attention(Q, K, V, causal=True, query_offset=OFFSET.int()),
        TypeError,
        "query_offset must be int64, got int32",
    ),
    BadCall(
        lambda: attention(Q, K, V, causal=True, query_offset=torch.arange(3)),
        ValueError,
        r"query_offset must be \[2\] or \[1\], got \[3\]",
    ),
    BadCall(
        lambda: attention(Q[:1], K[:1], V[:1], causal=True, query_offset=torch.arange(3)),
        ValueError,
        r"query_offset must be \[1\], got \[3\]",
    ),
    BadCall(
        lambda: attention(Q, K, V, causal=True, prefix_length=torch.tensor(3)),
        ValueError,
        r"prefix_length must be \[2\], got \[\]",
    ),
    BadCall(
        lambda: attention(Q, K, V, causal=True, prefix_length=OFFSET),
        ValueError,
        r"prefix_length must be \[2\], got \[1\]",
    ),
    BadCall(
        lambda: attention(Q, K, V, causal=True, prefix_length=FIRST),
        ValueError,
        r"prefix_length must be \[2, 4\], got \[1, 4\]",
    ),
    BadCall(
        lambda: attention(Q, K, V, first_key=FIRST.int()),
        TypeError,
        "first_key must be int64, got int32",
    ),
    BadCall(
        lambda: attention(Q, K, V, first_key=FIRST[:, :3]),
        ValueError,
        r"first_key must be \[2, 4\] or \[1, 4\], got \[1, 3\]",
    ),
    BadCall(
        lambda: attention(Q, K, V, first_key=FIRST[0]),
        ValueError,
        r"first_key must be \[2, 4\] or \[1, 4\], got \[4\]",
    ),
    BadCall(
        lambda: attention(Q, K, V, key_mask=MASK.int()),
        TypeError,
        "key_mask must be bool, got int32",
    ),
    BadCall(
        lambda: attention(Q, K, V, key_mask=[True]),
        TypeError,
        "key_mask must be a torch.Tensor, got list",
    ),
    BadCall(
        lambda: attention(Q, K, V, key_mask=MASK[:1]),
        ValueError,
        r"key_mask must be \[2, 6\], got \[1, 6\]",
    ),
    BadCall(
        lambda: attention(Q, K, V, key_bias=BIAS.half()),
        TypeError,
        "key_bias must be float32, got float16",
    ),
    BadCall(
        lambda: attention(Q, K, V, key_bias=BIAS[:, :2]),
        ValueError,
        r"key_bias must be \[2, 6\] or \[1, 6\], got \[1, 2\]",
    ),
    BadCall(
        lambda: attention(Q, K, V, key_bias=BIAS.clone().requires_grad_()),
        ValueError,
        "key_bias gets no gradient",
    ),
    BadCall(lambda: attention(Q.to("meta"), K, V), ValueError, r"k is on \S+, q on meta"),
    BadCall(
        lambda: torch.ops.mllama.attention(
            Q, K, V[:1], None, None, None, None, None, False, None, 1.0, None
        ),
        THROWN,
        "invalid v",
    ),
    BadCall(
        lambda: torch.ops.mllama.attention(
            Q, K, V, None, None, OFFSET, None, None, False, None, 1.0, None
        ),
        THROWN,
        "invalid causal",
    ),
    BadCall(
        lambda: torch.ops.mllama.attention(
            Q, K, V, MASK[:1], None, None, None, None, False, None, 1.0, None
        ),
        THROWN,
        "invalid key_mask",
    ),
    BadCall(
        lambda: torch.ops.mllama.attention(Q, K.half(), V, *5 * [None], False, None, 1.0, None),
        THROWN,
        "invalid k",
    ),
    BadCall(
        lambda: torch.ops.mllama.attention(
            Q, K, V, MASK.int(), None, None, None, None, False, None, 1.0, None
        ),
        THROWN,
        "invalid key_mask",
    ),
]


def reference_of(q, k, v, dtype, **masks):
    return reference(*(tensor.detach().to(dtype) for tensor in (q, k, v)), **masks)


@pytest.mark.parametrize("heads, kv_heads", [(1, 1), (8, 1), (8, 2), (9, 3), (5, 5), (20, 1)])
@pytest.mark.parametrize("queries", [1, 7])
def test_group_sizes(queries, heads, kv_heads):
    q, k, v = tensors(2, queries, 40, heads, kv_heads, 32)
    assert_close(
        attention(q, k, v, causal=True),
        reference_of(q, k, v, torch.float64, causal=True),
        1e-5,
        "attention",
    )


@needs_kernels
@pytest.mark.parametrize("size", [16, 20, 31, 48, 63, 65, 80, 96, 100, 128, 160, 255])
def test_head_sizes(size):
    for isa in instruction_sets():
        for dtype in (torch.float32, torch.bfloat16):
            for queries in (1, 26):
                q, k, v = (tensor.to(dtype) for tensor in tensors(1, queries, 27, 1, 1, size))
                with instruction_set(isa):
                    actual = attention(q, k, v, causal=True)
                expected = reference_of(q, k, v, torch.float64, causal=True)
                assert_close(
                    actual, expected, TOLERANCE[dtype], f"{isa}, {dtype}, {queries} queries"
                )


@needs_kernels
def test_cache_views():
    """Keys in a cache [B, KV, room, D], transposed and cut to its length, equal the same keys in
    memory of their own.
    """
    room = torch.full((2, 2, 64, 32), torch.nan)
    cache_k, cache_v = room.clone(), room.clone()
    cache_k[:, :, :50], cache_v[:, :, :50] = torch.randn(2, 2, 50, 32), torch.randn(2, 2, 50, 32)
    k, v = cache_k[:, :, :50].transpose(1, 2), cache_v[:, :, :50].transpose(1, 2)
    fused = torch.randn(2, 30, 3, 4, 32)  # queries as one slice of a joint projection
    for queries in (1, 30):
        q = fused[:, :queries, 1]
        assert torch.equal(
            attention(q, k, v, causal=True),
            attention(q.contiguous(), k.contiguous(), v.contiguous(), causal=True),
        )


def test_static_cache_offset():
    """A cache's unwritten end, beyond the causal limit, changes nothing."""
    q, k, v = tensors(2, 1, 700, 4, 2, 32)
    for queries in (1, 30):
        q = torch.randn(2, queries, 4, 32)
        short = attention(q, k[:, :300], v[:, :300], causal=True)
        assert_close(
            attention(q, k, v, causal=True, query_offset=torch.tensor([300 - queries])),
            short,
            1e-6,
            f"{queries} queries",
        )


def to_torch(*tensors):
    return (tensor.transpose(1, 2) for tensor in tensors)  # (B, H, T, D)


@pytest.mark.parametrize("queries", [30, 2])
def test_softcap_is_as_in_gemma2(queries):
    """transformers' eager attention with its sliding mask."""
    module = torch.nn.Module().eval()
    module.num_key_value_groups = 2
    q, k, v = tensors(2, queries, 30, 4, 2, 32)
    mask = eager_mask(
        batch_size=2,
        q_length=queries,
        kv_length=30,
        q_offset=30 - queries,
        device=q.device,
        mask_function=sliding_window_causal_mask_function(7),
    )
    expected, weights = modeling_gemma2.eager_attention_forward(
        module, *to_torch(q, k, v), mask, scaling=0.9, softcap=2.0
    )
    options = {"scale": 0.9, "softcap": 2.0, "causal": True, "window": 7}
    assert_close(attention(q, k, v, **options), expected, 1e-5, "attention")
    assert_close(attention_weights(q, k, **options), weights, 1e-5, "weights")


def test_window_beside_a_prefix_is_as_in_paligemma2():
    """Positions of the prefix see all of it; later ones see it through the window only."""
    prefixes = torch.tensor([5, 12])
    blocks = torch.where(torch.arange(20) < prefixes[:, None], 0, -1)
    q, k, v = tensors(2, 20, 20, 2, 2, 16)
    mask = sdpa_mask(
        batch_size=2,
        q_length=20,
        kv_length=20,
        device=q.device,
        allow_is_causal_skip=False,
        mask_function=or_masks(sliding_window_causal_mask_function(4), blockwise_overlay(blocks)),
    )
    expected = torch.nn.functional.scaled_dot_product_attention(*to_torch(q, k, v), attn_mask=mask)
    actual = attention(q, k, v, causal=True, window=4, prefix_length=prefixes)
    assert_close(actual, expected.transpose(1, 2), 1e-5, "attention")


@needs_kernels
@pytest.mark.parametrize("queries", [1, 3, 30])
def test_keys_before_the_window_may_hold_anything(queries):
    q, k, v = tensors(2, queries, 700, 4, 2, 16)
    spoiled = k.clone(), v.clone()
    for tensor in spoiled:
        tensor[:, : 700 - queries - 8] = torch.nan
    for isa in instruction_sets():
        with instruction_set(isa):
            expected = attention(q, k, v, causal=True, window=9)
            assert torch.equal(attention(q, *spoiled, causal=True, window=9), expected)


def test_bias_is_multiplicity():
    """log(n) added to a key's score equals n copies of that key."""
    q, k, v = tensors(1, 30, 5, 2, 1, 16)
    counts = torch.tensor([1, 3, 1, 7, 2])
    copies = attention(q, k.repeat_interleave(counts, 1), v.repeat_interleave(counts, 1))
    assert_close(attention(q, k, v, key_bias=counts.float().log()[None]), copies, 1e-5, "counts")


def test_prefix_is_bidirectional():
    q, k, v = tensors(1, 9, 9, 2, 1, 16)
    out = attention(q, k, v, causal=True, prefix_length=torch.tensor([6]))
    assert_close(out[:, :6], attention(q[:, :6], k[:, :6], v[:, :6]), 1e-6, "prefix")
    assert_close(out[:, 6:], attention(q, k, v, causal=True)[:, 6:], 1e-6, "rest")


@pytest.mark.parametrize("queries", [1, 30])
def test_rows_that_see_nothing(queries):
    q, k, v = (tensor.requires_grad_() for tensor in tensors(2, queries, 20, 2, 1, 16))
    out = attention(q, k, v, key_mask=torch.tensor([True, False])[:, None].expand(2, 20))
    assert not out[1].any() and out[0].all()
    out.square().sum().backward()
    for tensor in (q, k, v):
        assert not tensor.grad[1].any() and tensor.grad[0].any() and tensor.grad.isfinite().all()


@pytest.mark.parametrize("queries", [1, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_large_scores(queries, dtype):
    """Scores of thousands, of either sign, neither overflow nor vanish."""
    q, k, v = (tensor.to(dtype) for tensor in tensors(1, queries, 300, 2, 1, 64))
    q, k = q * 50, k * 50
    for bias in (0.0, -3000.0):
        masks = {"key_bias": torch.full((1, 300), bias)}
        assert_close(
            attention(q, k, v, **masks),
            reference_of(q, k, v, torch.float64, **masks),
            TOLERANCE[dtype],
            f"bias {bias}",
        )


@needs_kernels
@pytest.mark.parametrize(
    "queries, keys", [(1, 1), (2, 9), (3, 6), (4, 5), (2, 17), (2, 300), (30, 40)]
)
def test_nan_query_is_nan(queries, keys):
    """Wherever in a vector or chunk the row's last key is: not taken for a row without keys."""
    q, k, v = tensors(1, queries, keys, 1, 1, 16)
    q[0, 0] = torch.nan
    for isa in instruction_sets():
        with instruction_set(isa):
            out = attention(q, k, v, causal=True)
        assert_close(out, reference(q, k, v, causal=True), 1e-5, isa)


def hide_by_mask(keys, *hidden):
    return {"key_mask": ~torch.isin(torch.arange(keys), torch.tensor(hidden))[None]}


def hide_by_bias(keys, *hidden):
    return {
        "key_bias": torch.zeros(1, keys).masked_fill(
            ~hide_by_mask(keys, *hidden)["key_mask"], -math.inf
        )
    }


@needs_kernels
@pytest.mark.parametrize("content", [math.nan, math.inf, 3e38])
@pytest.mark.parametrize("hide", [hide_by_mask, hide_by_bias])
def test_hidden_key_may_hold_anything(hide, content):
    masks = hide(40, 0, 5, 20, 39)
    for isa in instruction_sets():
        for queries in (1, 3, 30):
            q, k, v = (tensor.requires_grad_() for tensor in tensors(1, queries, 40, 1, 1, 16))
            spoiled = k.detach().clone()
            spoiled[0, [0, 5, 20, 39]] = content
            spoiled.requires_grad_()
            with instruction_set(isa):
                out = attention(q, spoiled, v, **masks)
                actual = torch.autograd.grad(out.square().sum(), (spoiled, v))
            plain = reference(q, k, v, **masks)
            assert_close(out, plain, 1e-5, f"{isa}, {queries} queries")
            for a, b in zip(actual, torch.autograd.grad(plain.square().sum(), (k, v)), strict=True):
                assert_close(a, b, 1e-5, f"{isa}, {queries} queries, gradient")


def joined(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


LEAST, MOST = torch.finfo(torch.float32).min, torch.finfo(torch.float32).max


@needs_kernels
@pytest.mark.parametrize("queries", [1, 3, 30])
@pytest.mark.parametrize(
    "bias",
    [
        [0, LEAST, 0, 0, 0],
        [0, 0, 3e38, 0, 0],
        [MOST, 0, LEAST, 0, 0],
        [math.nan, 0, 0, 1, 2],
        [math.nan] * 5,
        [0, math.inf, 0, 0, 0],
    ],
    ids=["one least", "one large", "both ends", "one nan", "all nan", "infinite"],
)
def test_extreme_bias(bias, queries):
    """Biases that leave f32 in the kernels' log2 units, and NaN, which hides as -inf does: results
    and gradients.
    """
    inputs = [tensor.requires_grad_() for tensor in tensors(1, queries, 5, 2, 1, 16)]
    masks = {"key_bias": torch.tensor([bias], dtype=torch.float32)}
    expected = reference(*inputs, **masks)
    gradients = torch.autograd.grad(expected.square().sum(), inputs)
    for isa in instruction_sets():
        with instruction_set(isa):
            out = attention(*inputs, **masks)
            actual = torch.autograd.grad(out.square().sum(), inputs)
        assert_close(out, expected, 1e-5, isa)
        assert_close(
            joined(actual), joined(gradients), 1e-5, f"{isa}, gradients"
        )  # together: where one key has all the weight, q's are 0


@pytest.mark.parametrize("queries", [1, 30])
def test_least_bias_everywhere_is_the_average(queries):
    """Scores vanish beside it, in f32: as where a library writes a mask with finfo.min."""
    q, k, v = tensors(1, queries, 9, 2, 1, 16)
    out = attention(q, k, v, key_bias=torch.full((1, 9), LEAST))
    assert_close(out, v.mean(1, keepdim=True).expand_as(q), 1e-5, "average")


@needs_kernels
@pytest.mark.parametrize("queries", [2, 30])
@pytest.mark.parametrize("least", [-1e9, LEAST])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_under_a_huge_bias(dtype, least, queries):
    """On every key of a row, on all but a few, and on all that the first queries see: beside it the
    logarithm of a sum would be lost.
    """
    q, k, v = (tensor.to(dtype).requires_grad_() for tensor in tensors(3, queries, 40, 4, 2, 32))
    huge = torch.arange(40) < torch.tensor([40, 36, 45 - queries])[:, None]
    exact = [tensor.detach().double().requires_grad_() for tensor in (q, k, v)]
    # What f32 swallows beside -1e9, f64 swallows beside finfo.min.
    expected = reference(*exact, causal=True, key_bias=torch.zeros(3, 40).masked_fill(huge, LEAST))
    gradients = torch.autograd.grad(expected.square().sum(), exact)
    for isa in instruction_sets():
        with instruction_set(isa):
            out = attention(
                q, k, v, causal=True, key_bias=torch.zeros(3, 40).masked_fill(huge, least)
            )
            actual = torch.autograd.grad(out.square().sum(), (q, k, v))
        assert_close(out, expected, TOLERANCE[dtype], isa)
        for name, a, b in zip("qkv", actual, gradients, strict=True):
            assert_close(a, b, 2 * TOLERANCE[dtype], f"{isa}, gradient of {name}")


@needs_kernels
@pytest.mark.parametrize("queries", [4, 30])
def test_nan_stays_in_its_row(queries):
    q, k, v = tensors(1, queries, queries, 1, 1, 16)
    q[0, 2] = torch.nan
    out = attention(q, k, v, causal=True)
    assert out[0, 2].isnan().all() and out[0, :2].isfinite().all() and out[0, 3:].isfinite().all()


@needs_kernels
def test_same_bits_on_any_number_of_threads():
    """Where work is cut into shares, chunks and partial sums: long enough for several of each."""
    length = 140 if devices.is_emulated() else 300
    q, k, v = (tensor.requires_grad_() for tensor in tensors(1, length, length, 6, 2, 16))
    few = torch.randn(1, 2, 6, 16)

    def results(function):
        out = function(q, k, v, causal=True)
        return [out, function(few, k, v), *torch.autograd.grad(out.square().sum(), (q, k, v))]

    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(results(attention))
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))
    for actual, expected in zip(found[0], results(reference), strict=True):
        assert_close(actual, expected, 1e-5, "cut work")


@needs_kernels
def test_saved_for_backward():
    """Nothing of size queries x keys is saved: q, k, v, the result and two numbers per query."""
    q, k, v = (tensor.requires_grad_() for tensor in tensors(1, 64, 64, 2, 1, 16))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda tensor: saved.append(tensor.shape) or tensor, lambda tensor: tensor
    ):
        attention(q, k, v, causal=True)
    assert sorted(saved) == sorted([q.shape, k.shape, v.shape, q.shape, (1, 2, 64, 2)])


@pytest.mark.parametrize("wanted", [(0,), (1,), (0, 2)])
def test_gradients_of_some_inputs(wanted):
    inputs = [
        tensor.requires_grad_(i in wanted) for i, tensor in enumerate(tensors(1, 20, 20, 2, 1, 16))
    ]
    asked = [inputs[i] for i in wanted]
    actual = torch.autograd.grad(attention(*inputs).square().sum(), asked)
    for a, b in zip(
        actual, torch.autograd.grad(reference(*inputs).square().sum(), asked), strict=True
    ):
        assert_close(a, b, 1e-5, "gradient")


def test_weights():
    masks = SAMPLES["everything"].kwargs
    q, k, v = SAMPLES["everything"].args
    weights = attention_weights(q, k, **masks)
    assert weights.shape == (2, 6, 25, 60) and weights.dtype == torch.float32
    values = v.repeat_interleave(3, 2).transpose(1, 2)
    assert_close(
        (weights @ values).transpose(1, 2),
        attention(q, k, v, **masks),
        1e-5,
        "weights times values",
    )
    sums = weights.sum(-1)
    assert torch.all(((sums - 1).abs() < 1e-5) | (sums == 0))
    with pytest.raises(ValueError, match="must agree in batch"):
        attention_weights(q, k[:1])


def test_matches_torch():
    q, k, v = tensors(2, 30, 30, 4, 2, 64)
    expected = torch.nn.functional.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), is_causal=True, enable_gqa=True
    )
    assert_close(attention(q, k, v, causal=True), expected.transpose(1, 2), 1e-5, "attention")


@pytest.mark.parametrize(
    "offset", [lambda position: torch.tensor([position]), int], ids=["tensor", "int"]
)
def test_compiled_with_offset(offset):
    """One graph serves every position of a decoding step."""

    def step(q, k, v, offset):
        return attention(q, k, v, causal=True, query_offset=offset, window=4, softcap=3.0)

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager", dynamic=True)
    q, k, v = tensors(1, 1, 32, 4, 2, 16)
    for position in (2, 5, 31):
        assert torch.equal(compiled(q, k, v, offset(position)), step(q, k, v, offset(position)))
    torch._dynamo.reset()


def test_compiled_int_offset_becomes_dynamic():
    """The second value of an int makes it a symbol, which messages must not be built from."""
    q, k, v = tensors(1, 2, 32, 2, 1, 16)
    compiled = torch.compile(
        lambda *args, o: attention(*args, causal=True, query_offset=o),
        fullgraph=True,
        backend="aot_eager",
    )
    for offset in (2, 3, 17):
        assert torch.equal(
            compiled(q, k, v, o=offset), attention(q, k, v, causal=True, query_offset=offset)
        )
    torch._dynamo.reset()


@needs_kernels
@pytest.mark.parametrize("isa", instruction_sets() if not _ext.disabled() else [])
def test_several_sequences_are_as_alone(isa):
    """And what other sequences hold does not reach them, in results and gradients."""
    lengths = [130, 1, 60, 9]
    q, k, v = tensors(1, 200, 200, 4, 2, 32)
    parts = [[part.requires_grad_() for part in tensor.split(lengths, 1)] for tensor in (q, k, v)]
    with instruction_set(isa):
        packed = attention(
            *(torch.cat(tensor, 1) for tensor in parts), causal=True, first_key=starts(lengths)
        )
        alone = torch.cat(
            [attention(*tensor, causal=True) for tensor in zip(*parts, strict=True)], 1
        )
        leaves = [leaf for tensor in parts for leaf in tensor]
        gradients = [torch.autograd.grad(out.square().sum(), leaves) for out in (packed, alone)]
        spoiled = torch.cat(
            [
                torch.full_like(part, torch.nan) if i == 0 else part
                for i, part in enumerate(parts[1])
            ],
            1,
        )
        beside = attention(q, spoiled, v, causal=True, first_key=starts(lengths))[:, 130:]
    assert_close(packed, alone, 1e-6, "results")
    assert_close(joined(gradients[0]), joined(gradients[1]), 1e-6, "gradients")
    assert_close(beside, packed[:, 130:], 1e-6, "beside a sequence of NaN")


@needs_kernels
@pytest.mark.parametrize("queries", [2, 60])
def test_one_sequence_has_the_same_bits_as_none(queries):
    inputs = [tensor.requires_grad_() for tensor in tensors(2, queries, queries, 4, 2, 32)]
    found = []
    for masks in ({}, {"first_key": torch.zeros(1, queries, dtype=torch.long)}):
        out = attention(*inputs, causal=True, **masks)
        found.append([out, *torch.autograd.grad(out.square().sum(), inputs)])
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


@needs_kernels
@pytest.mark.skipif(devices.runs_cuda_kernels(), reason="only the CPU's kernels promise it")
@pytest.mark.parametrize("heads, kv_heads", [(4, 4), (8, 2), (9, 3)])
@pytest.mark.parametrize("window", [None, 5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_few_queries_have_the_bits_that_each_has_alone(heads, kv_heads, window, dtype):
    new, keys = 24 * kv_heads // heads, 523  # as many as the kernel for few queries takes
    q, k, v = (x.to(dtype) for x in tensors(2, new, keys, heads, kv_heads, 48))
    how = {"causal": True, "window": window}
    for isa in instruction_sets():
        with instruction_set(isa):
            ends = range(keys - new + 1, keys + 1)
            alone = [
                attention(q[:, i : i + 1], k[:, :end], v[:, :end], **how)
                for i, end in enumerate(ends)
            ]
            assert torch.equal(attention(q, k, v, **how), torch.cat(alone, 1))
