"""resize and resize_normalize on images of common sizes, to SigLIP-base's input."""

from collections.abc import Iterator

import numpy as np
import torch
from PIL import Image
from transformers.image_transforms import normalize, rescale

from benchmarks import shapes
from benchmarks.harness import Case
from mllama.ops import resize, resize_normalize
from mllama.processing.image import normalization_table

PEER = (
    "Pillow, torch's antialiased uint8 interpolate (other last bits), and Pillow with "
    "transformers' numpy rescale and normalize"
)
SIZES = ((480, 640), (768, 1024), (3000, 4000), (96, 96))  # H, W


def cases() -> Iterator[Case]:
    """Every size, bicubic, against each peer. GB/s counts the image read and the result written
    once.
    """
    side = shapes.IMAGE
    half = (0.5, 0.5, 0.5)
    table = normalization_table(half, half)
    for height, width in SIZES:
        array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image, source = torch.from_numpy(array), Image.fromarray(array)
        planes = image.permute(2, 0, 1)[None]  # channels last in memory, torch's fast path

        def pillow(source=source):
            return np.array(source.resize((side, side), Image.Resampling.BICUBIC))

        def interpolate(planes=planes):
            return torch.nn.functional.interpolate(
                planes, (side, side), mode="bicubic", antialias=True
            )

        def stock(pillow=pillow):
            return normalize(
                rescale(pillow().transpose(2, 0, 1), 1 / 255, input_data_format="channels_first"),
                half,
                half,
                input_data_format="channels_first",
            )

        def ours(image=image):
            return resize(image, side, side)

        def ours_normalized(image=image):
            return resize_normalize(image, side, side, table)

        shape, read = f"{height}x{width} to {side}x{side}", array.nbytes
        yield Case(shape, torch.uint8, "resize, Pillow", ours, pillow, bytes=read + side * side * 3)
        yield Case(
            shape, torch.uint8, "resize, torch", ours, interpolate, bytes=read + side * side * 3
        )
        yield Case(
            shape,
            torch.float32,
            "and normalize",
            ours_normalized,
            stock,
            bytes=read + side * side * 12,
        )
