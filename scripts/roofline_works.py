"""What scripts/rooflines.py estimates: launches of Llama-3.2-1B in float16, one sequence. Decode
is a token after CONTEXT others, prefill all of them; gradients are prefill's.
"""

from collections.abc import Iterator
from dataclasses import dataclass

CONTEXT, HIDDEN, INNER, VOCABULARY = 4096, 2048, 8192, 128256
HEADS, KV_HEADS, SIZE, RANK = 32, 8, 64, 16
PIXELS = (1600, 1200, 560)  # width and height of an image, and of a tile
TILE_STRIDE = 2 * (SIZE + 8)  # bytes of a row of attention's tiles


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


def rows(tokens: int, when: str) -> Iterator[Work]:
    """Kernels that go through activations once."""
    x, inner = 2 * tokens * HIDDEN, 2 * tokens * INNER  # bytes
    turned, keys = tokens * (HEADS + KV_HEADS) * SIZE, tokens * KV_HEADS * SIZE  # elements
    norm = "<mllama::f16, mllama::f16, 8, 8>"
    yield Work(f"add_rms_norm, {when}", "rms_norm", "rms_norm" + norm, tokens, 256, 4 * x, 4 * x)
    yield Work(
        f"rope, {when}", "rope", "rope<mllama::f16, 8>", turned / 4096, 256, 4 * turned, 3 * turned
    )
    gated = "gated<mllama::f16, mllama::cuda::Silu, 8>"
    yield Work(f"swiglu, {when}", "gated", gated, inner / 4096, 256, 3 * inner, 4 * inner)
    codes = "quantize_activations<mllama::f16>"
    yield Work(
        f"packed_linear, rounding of x, {when}",
        "packed_linear",
        codes,
        x / 512,
        256,
        1.6 * x,
        5 * x,
    )
    yield Work(
        f"quantize_rows of keys, {when}",
        "quantized_rows",
        "quantize_rows<mllama::f16>",
        keys / 256,
        256,
        3.06 * keys,
        10 * keys,
    )


def products(tokens: int, when: str, turing: bool) -> Iterator[Work]:
    """The layer from HIDDEN to INNER, packed, and its adapter."""
    terms = 2 * tokens * HIDDEN * INNER
    formats = {
        "float16": (2.0, "Float{}<mllama::f16{}>", "fma", "f16"),
        "int8": (17 / 16, "Code{}<(mllama::kernels::Packing)3>", "dp4a", "int8"),
        "int4": (9 / 16, "Code{}<(mllama::kernels::Packing)4>", "dp4a", "int8"),
    }
    for name, (bytes_each, steps, few, many) in formats.items():
        weight, x = bytes_each * HIDDEN * INNER, (2 if name == "float16" else 1.2) * tokens * HIDDEN
        size = weight + x + 2 * tokens * INNER
        what = f"packed_linear of {name}, {when}"
        if tokens == 1 or turing:
            part = 4 if tokens > 1 else 1
            half = "mllama::cuda::" + steps.format("Half", ", mllama::f16")
            kernel = f"multiply_few<{half}, mllama::f16, {part}>"
            blocks = INNER / 16 * tokens / part
            yield Work(what, "packed_linear", kernel, blocks, 256, size, terms, few,
                       moved=weight * tokens / part + x * INNER / 16)  # fmt: skip
        else:
            kernel = f"multiply_many<mllama::cuda::{steps.format('Steps', '')}, mllama::f16>"
            blocks = INNER / 64 * tokens / 64
            yield Work(what, "packed_linear", kernel, blocks, 128, size, terms, many,
                       moved=weight * tokens / 64 + x * INNER / 64)  # fmt: skip
    x, factor, terms = 2 * tokens * HIDDEN, 4 * RANK * HIDDEN, 2 * tokens * HIDDEN * RANK
    for product, size in {"down": x, "up": 2 * x, "outer": x}.items():
        if tokens == 1 and product == "outer":
            continue
        few = tokens == 1 and product == "down"
        kernel = f"low_rank_{'dots' if few else product}<mllama::f16, float>"
        blocks = RANK / 8 if few else max(tokens / 32, 1) * (HIDDEN / 32 if product == "up" else 1)
        if product == "outer":
            blocks = HIDDEN / 32
        yield Work(f"lora_linear, {product}, {when}", "lora_linear", kernel, blocks,
                   256 if few else 128, size + factor, terms)  # fmt: skip


def attention(turing: bool) -> Iterator[Work]:
    tiles = f"mllama::cuda::TensorTiles<mllama::f16, {SIZE}, {str(turing).lower()}>"
    cache, q = 2 * 2 * CONTEXT * KV_HEADS * SIZE, 2 * CONTEXT * HEADS * SIZE  # bytes
    product = 2 * CONTEXT * HEADS * SIZE  # of one query's heads with all keys, or with all values
    shape = "attention<mllama::cuda::ForwardShape<" + tiles
    keys = ", mllama::cuda::KeyRows<mllama::f16> >"
    blocks, parts = 256, 256 // KV_HEADS
    results = 4 * HEADS * parts * (SIZE + 2)
    yield Work("attention, decode", "attention", f"{shape}, 1, 4, 16>{keys}", blocks, 128,
               cache + results, 2 * product, "f16", (16 + 2 * 64) * TILE_STRIDE)  # fmt: skip
    yield Work("attention, merging of parts, decode", "attention", "merge_attention<mllama::f16>",
               HEADS / 4, 128, results, HEADS * parts * SIZE * 3)  # fmt: skip
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
    yield Work("select_token, top_k and top_p", "select_token", select, 1, 256, 1.5 * scores,
               66 * 2 * VOCABULARY, moved=68 * scores)  # fmt: skip


def works(architecture: int) -> list[Work]:
    """What is launched on a device."""
    turing = architecture < 80
    found = [*attention(turing)]
    for tokens, when in ((1, "decode"), (CONTEXT, "prefill")):
        found += [*rows(tokens, when), *products(tokens, when, turing)]
    return [*found, *others()]
