"""resize and resize_normalize on images of common sizes, to SigLIP-base's input and to four of
Llama-3.2-Vision's tiles.
"""

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
SIDE = (shapes.IMAGE, shapes.IMAGE)
SIZES = (  # H, W; height, width, of the result
    ((480, 640), SIDE),
    ((768, 1024), SIDE),
    ((3000, 4000), SIDE),
    ((96, 96), SIDE),
    ((3000, 4000), (840, 1120)),  # on 2 x 2 tiles of 560
)


def cases() -> Iterator[Case]:
    """Every size, bicubic, against each peer. GB/s counts the image read and the result written
    once.
    """
    half = (0.5, 0.5, 0.5)
    device = torch.get_default_device()
    table = normalization_table(half, half).to(device)
    for (height, width), target in SIZES:
        array = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
        image, source = torch.from_numpy(array).to(device), Image.fromarray(array)
        planes = image.permute(2, 0, 1)[None]  # channels last in memory, torch's fast path

        def pillow(source=source, size=target[::-1]):
            return np.array(source.resize(size, Image.Resampling.BICUBIC))

        def interpolate(planes=planes, target=target):
            return torch.nn.functional.interpolate(planes, target, mode="bicubic", antialias=True)

        def stock(pillow=pillow):
            return normalize(
                rescale(pillow().transpose(2, 0, 1), 1 / 255, input_data_format="channels_first"),
                half,
                half,
                input_data_format="channels_first",
            )

        def ours(image=image, target=target):
            return resize(image, *target)

        def ours_normalized(image=image, target=target):
            return resize_normalize(image, *target, table)

        shape, read = f"{height}x{width} to {target[0]}x{target[1]}", array.nbytes
        written = target[0] * target[1] * 3
        yield Case(shape, torch.uint8, "resize, Pillow", ours, pillow, bytes=read + written)
        yield Case(shape, torch.uint8, "resize, torch", ours, interpolate, bytes=read + written)
        yield Case(
            shape, torch.float32, "and normalize", ours_normalized, stock, bytes=read + 4 * written
        )
