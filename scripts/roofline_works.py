"""What scripts/rooflines.py estimates: launches of Llama-3.2-1B in float16, one sequence. Decode
is a token after CONTEXT others, prefill all of them; gradients are prefill's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

CONTEXT, HIDDEN, INNER, VOCABULARY, LAYERS = 4096, 2048, 8192, 128256, 16
HEADS, KV_HEADS, SIZE, RANK = 32, 8, 64, 16
PIXELS = (1600, 1200, 560)  # width and height of an image, and of a tile
TILE_STRIDE = 2 * (SIZE + 8)  # bytes of a row of attention's tiles
WEIGHT_BYTES = {"float16": 2.0, "int8": 17 / 16, "int4": 9 / 16}  # of an element


@dataclass(frozen=True)
class Work:
    name: str
    source: str  # csrc/kernels/cuda/<source>.cu
    kernel: str  # with its template's arguments, in the namespace mllama::cuda
    blocks: float
    threads: int
    size: float  # bytes of its tensors, each once
    operations: float
    unit: str = "fma"
    dynamic: int = 0  # bytes of shared memory
    moved: float = (
        0  # bytes to and from multiprocessors, where that is more: several blocks read it
    )
    count: int = 0  # launches of a token of `decode_step` with int4 weights and a float16 cache


def rows() -> Iterator[Work]:
    """Prefill's kernels that go through activations once."""
    x, inner = 2 * CONTEXT * HIDDEN, 2 * CONTEXT * INNER  # bytes
    turned, keys = CONTEXT * (HEADS + KV_HEADS) * SIZE, CONTEXT * KV_HEADS * SIZE  # elements
    norm = "<mllama::f16, mllama::f16, 8, 8>"
    yield Work("add_rms_norm, prefill", "rms_norm", "rms_norm" + norm, CONTEXT, 256, 4 * x, 4 * x)
    yield Work("rope, prefill", "rope", "rope<mllama::f16, 8>", turned / 4096, 256, 4 * turned,
               3 * turned)  # fmt: skip
    gated = "gated<mllama::f16, mllama::cuda::Silu, 8>"
    yield Work("swiglu, prefill", "gated", gated, inner / 4096, 256, 3 * inner, 4 * inner)
    yield Work("packed_linear, rounding of x, prefill", "packed_linear",
               "quantize_activations<mllama::f16>", x / 512, 256, 1.6 * x, 5 * x)  # fmt: skip
    yield Work("quantize_rows of keys, prefill", "quantized_rows", "quantize_rows<mllama::f16>",
               keys / 256, 256, 3.06 * keys, 10 * keys)  # fmt: skip


def few_rows(name: str, x_dtype: str, rows: int) -> tuple[str, str]:
    """The kernel for few rows of x and its unit, by the weights' format."""
    half = {
        "float16": f"FloatHalf<mllama::f16, {x_dtype}>",
        "int8": "CodeHalf<(mllama::kernels::Packing)3>",
        "int4": "CodeHalf<(mllama::kernels::Packing)4>",
    }[name]
    unit = "fma" if name == "float16" else "dp4a"
    return f"multiply_few<mllama::cuda::{half}, {x_dtype}, {rows}>", unit


def products(turing: bool) -> Iterator[Work]:
    """Prefill's layer from HIDDEN to INNER, packed, and its adapter."""
    terms = 2 * CONTEXT * HIDDEN * INNER
    tiles = {
        "float16": ("FloatSteps<mllama::f16>", "f16"),
        "int8": ("CodeSteps<(mllama::kernels::Packing)3>", "int8"),
        "int4": ("CodeSteps<(mllama::kernels::Packing)4>", "int8"),
    }
    for name, (steps, many) in tiles.items():
        weight = WEIGHT_BYTES[name] * HIDDEN * INNER
        x = (2 if name == "float16" else 1.2) * CONTEXT * HIDDEN
        size = weight + x + 2 * CONTEXT * INNER
        what = f"packed_linear of {name}, prefill"
        if turing:
            kernel, few = few_rows(name, "mllama::f16", 4)
            yield Work(what, "packed_linear", kernel, INNER / 16 * CONTEXT / 4, 256, size, terms,
                       few, moved=weight * CONTEXT / 4 + x * INNER / 16)  # fmt: skip
        else:
            kernel = f"multiply_many<mllama::cuda::{steps}, mllama::f16>"
            yield Work(what, "packed_linear", kernel, INNER / 64 * CONTEXT / 64, 128, size, terms,
                       many, moved=weight * CONTEXT / 64 + x * INNER / 64)  # fmt: skip
    x, factor, terms = 2 * CONTEXT * HIDDEN, 4 * RANK * HIDDEN, 2 * CONTEXT * HIDDEN * RANK
    for product, size in {"down": x, "up": 2 * x, "outer": x}.items():
        blocks = HIDDEN / 32 if product == "outer" else CONTEXT / 32
        yield Work(f"lora_linear, {product}, prefill", "lora_linear",
                   f"low_rank_{product}<mllama::f16, float>",
                   blocks * (HIDDEN / 32 if product == "up" else 1), 128, size + factor,
                   terms)  # fmt: skip


def decode_step(turing: bool) -> Iterator[Work]:
    """A token of `decode_step`, whose activations are float32."""
    x, inner, heads = 4 * HIDDEN, 4 * INNER, (HEADS + 2 * KV_HEADS) * SIZE
    half, norms = SIZE / 2, 2 * LAYERS + 1
    yield Work("decode_step, start", "decode", "start_step<0>", 1, 256, 12 * half, 60 * half,
               count=1)  # fmt: skip
    yield Work("decode_step, sum and norm", "rms_norm", "rms_norm<float, float, 8, 4>", 1, 256,
               5 * x, HIDDEN * 4, count=norms)  # fmt: skip
    for width, name, count in ((HIDDEN, "hidden", 3), (INNER, "inner", 1)):
        yield Work(f"decode_step, rounding of {name} x", "packed_linear",
                   "quantize_activations<float>", width / 256, 256, 5.25 * width, 10 * width,
                   count=count * LAYERS)  # fmt: skip
    layers = [
        ("q, k and v", "int4", HIDDEN, heads, LAYERS),
        ("o", "int4", HIDDEN, HIDDEN, LAYERS),
        ("gate and up", "int4", HIDDEN, 2 * INNER, LAYERS),
        ("down", "int4", INNER, HIDDEN, LAYERS),
        ("gate and up", "int8", HIDDEN, 2 * INNER, 0),
        ("gate and up", "float16", HIDDEN, 2 * INNER, 0),
    ]
    for what, name, before, after, count in layers:
        weight, input_bytes = WEIGHT_BYTES[name] * before * after, 4 if name == "float16" else 1.25
        kernel, unit = few_rows(name, "float", 1)
        yield Work(f"decode_step, {what} of {name}", "packed_linear", kernel, after / 16, 256,
                   weight + input_bytes * before + 4 * after, 2 * before * after, unit,
                   moved=weight + input_bytes * before * after / 16, count=count)  # fmt: skip
    yield Work("decode_step, heads to the cache", "decode", "place_heads<mllama::f16, mllama::f16>",
               heads / SIZE / 4, 128, 6 * heads, 8 * heads, count=LAYERS)  # fmt: skip
    yield from decode_attention(turing)
    yield Work("decode_step, swiglu", "gated", "gated<float, mllama::cuda::Silu, 4>", INNER / 1024,
               256, 3 * inner, 8 * INNER, count=LAYERS)  # fmt: skip
    factor, terms = 4 * RANK * HIDDEN, 2 * HIDDEN * RANK
    yield Work("decode_step, adapter, down", "lora_linear", "low_rank_dots<float, float>", RANK / 8,
               256, x + factor, terms)  # fmt: skip
    yield Work("decode_step, adapter, up", "lora_linear", "low_rank_up<float, float>", HIDDEN / 32,
               128, 2 * x + factor, terms)  # fmt: skip
    yield Work("decode_step, gate of image layers", "decode", "scale_rows<0>", HIDDEN / 256, 256,
               2 * x, HIDDEN)  # fmt: skip


def decode_attention(turing: bool) -> Iterator[Work]:
    """What attends to a cache, whose parts have 256 keys each."""
    elements, product = 2 * CONTEXT * KV_HEADS * SIZE, 2 * CONTEXT * HEADS * SIZE
    parts = CONTEXT // 256
    blocks, results = KV_HEADS * parts, 4 * HEADS * parts * (SIZE + 2)  # bytes
    tensor = f"TensorTiles<mllama::f16, {SIZE}, {str(turing).lower()}>"
    plain = f"FloatTiles<float, {SIZE}, {str(turing).lower()}>"
    caches = [
        ("float16", tensor, "KeyRows<mllama::f16> ", 2.0, "f16", TILE_STRIDE, LAYERS),
        ("int8", plain, "QuantizedKeyRows", 1 + 2 / 32, "fma", 4 * (SIZE + 4), 0),
    ]
    for name, tiles, keys, size, unit, stride, count in caches:
        kernel = f"attention<mllama::cuda::ForwardShape<mllama::cuda::{tiles}, 1, 4, 16>"
        yield Work(f"decode_step, attention to {name}", "attention",
                   f"{kernel}, mllama::cuda::{keys}>", blocks, 128, size * elements + results,
                   2 * product, unit, (16 + 2 * 64) * stride, count=count)  # fmt: skip
    yield Work("decode_step, merging of parts", "attention", "merge_attention<float>", HEADS / 4,
               128, results, HEADS * parts * SIZE * 3, count=LAYERS)  # fmt: skip


def attention(turing: bool) -> Iterator[Work]:
    tiles = f"mllama::cuda::TensorTiles<mllama::f16, {SIZE}, {str(turing).lower()}>"
    cache, q = 2 * 2 * CONTEXT * KV_HEADS * SIZE, 2 * CONTEXT * HEADS * SIZE  # bytes
    product = 2 * CONTEXT * HEADS * SIZE  # of one query's heads with all keys, or with all values
    shape = "attention<mllama::cuda::ForwardShape<" + tiles
    keys = ", mllama::cuda::KeyRows<mllama::f16> >"
    causal = CONTEXT / 2 * product  # of all queries
    blocks = KV_HEADS * CONTEXT * HEADS / KV_HEADS / 64
    yield Work("attention, prefill", "attention", f"{shape}, 4, 1, 64>{keys}", blocks, 128,
               cache + 2 * q, 2 * causal, "f16", 3 * 64 * TILE_STRIDE,
               moved=2 * q + blocks * cache / KV_HEADS / 2)  # fmt: skip
    shape = "<mllama::cuda::BackwardShape<" + tiles
    yield Work("attention, deltas", "attention_backward", "attention_deltas<mllama::f16>",
               CONTEXT * HEADS / 4, 128, 2 * q, q)  # fmt: skip
    shared = 2 * (64 + 32) * TILE_STRIDE
    blocks = KV_HEADS * CONTEXT / 64
    yield Work("attention, gradients of k and v", "attention_backward",
               f"attention_key_gradients{shape}, true, 4, 32> >", blocks, 128,
               2 * cache + 2 * q, 4 * causal, "f16", shared,
               moved=2 * cache + blocks * q / KV_HEADS)  # fmt: skip
    blocks = CONTEXT * HEADS / 64
    yield Work("attention, gradient of q", "attention_backward",
               f"attention_query_gradient{shape}, false, 4, 32> >", blocks, 128,
               cache + 3 * q, 3 * causal, "f16", shared,
               moved=3 * q + blocks * cache / KV_HEADS / 2)  # fmt: skip


def others() -> Iterator[Work]:
    """Other gradients, images, and what selects a token."""
    x, inner = 2 * CONTEXT * HIDDEN, 2 * CONTEXT * INNER  # bytes
    norm = "<mllama::f16, mllama::f16, 8, 8>"
    yield Work("rms_norm, gradient of x", "rms_norm", "rms_norm_backward" + norm, CONTEXT, 256,
               3 * x, 6 * x)  # fmt: skip
    yield Work("rms_norm, gradient of the weight", "rms_norm",
               "rms_norm_weight_gradient<mllama::f16>", HIDDEN / 128 * 64, 128, 2 * x,
               1.5 * x)  # fmt: skip
    yield Work("layer_norm of as many", "layer_norm", "layer_norm" + norm, CONTEXT, 256, 2 * x,
               5 * x)  # fmt: skip
    yield Work("swiglu, gradients", "gated",
               "gated_backward<mllama::f16, mllama::cuda::Silu, 8>", inner / 4096, 256, 5 * inner,
               6 * inner)  # fmt: skip
    yield Work("unpack_weight of int4", "packed_linear",
               "unpack_weight<mllama::cuda::CodeValue<(mllama::kernels::Packing)4>, mllama::f16>",
               HIDDEN * INNER / 256, 256, (2 + 9 / 16) * HIDDEN * INNER,
               2 * HIDDEN * INNER)  # fmt: skip
    width, height, tile = PIXELS
    before, after = 3 * width * height, 3 * tile * height  # bytes
    taps = 4 * width / tile
    yield Work("resize of 1600 x 1200, columns", "image",
               "resize_axis<mllama::cuda::ResizeAxis>", after / 256, 256, before + after,
               2 * taps * after, moved=(5 * taps + 1) * after)  # fmt: skip
    patches = 3 * tile * tile
    yield Work("patch_embed of 560 x 560, cutting", "patch_embed", "cut_patches<unsigned short>",
               patches / 256, 256, 4 * patches, 0)  # fmt: skip
    scores = 4 * VOCABULARY
    select = "select_token<mllama::f16>"
    yield Work("select_token, greedy", "select_token", select, 1, 256, scores / 2,
               4 * VOCABULARY)  # fmt: skip
    # As many accesses as the emulator counts for normal scores.
    yield Work("select_token, top_k and top_p", "select_token", select, 1, 256, 2.5 * scores,
               60 * VOCABULARY, moved=20 * scores)  # fmt: skip
    scores = 2 * CONTEXT * VOCABULARY
    yield Work("cross_entropy and its gradient", "cross_entropy",
               "cross_entropy<mllama::f16, 8, 8>", CONTEXT, 256, 2 * scores,
               9 * CONTEXT * VOCABULARY, moved=4 * scores)  # fmt: skip


def works(architecture: int) -> list[Work]:
    """What is launched on a device."""
    turing = architecture < 80
    return [*attention(turing), *rows(), *products(turing), *decode_step(turing), *others()]
