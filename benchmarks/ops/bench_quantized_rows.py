"""quantize_rows on keys of a prompt, as a quantized key-value cache appends them."""

from collections.abc import Iterator

import torch

from benchmarks.harness import DTYPES, Case
from mllama.ops import dequantize_rows, quantize_rows
from mllama.ops.quantized_rows import reference_dequantize, reference_quantize

PEER = "the same in plain torch"
SHAPES = ((1, 512, 8, 64), (1, 512, 8, 128))


def cases() -> Iterator[Case]:
    """There and back, for every shape and dtype."""
    for shape in SHAPES:
        for dtype in DTYPES:
            x = torch.randn(shape, dtype=dtype)
            codes, size = quantize_rows(x), shape[-1]
            label = "x".join(map(str, shape))
            moved = x.numel() * x.element_size() + codes.numel()
            yield Case(
                f"quantize {label}",
                dtype,
                "forward",
                lambda x=x: quantize_rows(x),
                lambda x=x: reference_quantize(x),
                bytes=moved,
            )
            yield Case(
                f"dequantize {label}",
                dtype,
                "forward",
                lambda codes=codes, size=size, dtype=dtype: dequantize_rows(codes, size, dtype),
                lambda codes=codes, size=size, dtype=dtype: reference_dequantize(
                    codes, size, dtype
                ),
                bytes=moved,
            )
