"""SigLIP-base's vision encoder on one and on eight images of 224 x 224."""

from collections.abc import Iterator

import torch
from transformers import SiglipVisionConfig, SiglipVisionModel

from benchmarks.harness import DTYPES, Case
from mllama import SiglipModel

PEER = "transformers' SiglipVisionModel, sdpa"


def cases() -> Iterator[Case]:
    """Whole models, including the pooling head."""
    config = SiglipVisionConfig(image_size=224, patch_size=16)
    for dtype in DTYPES:
        theirs = SiglipVisionModel(config).to(dtype).eval()
        ours = SiglipModel(config).to(dtype).eval()
        ours.load_state_dict(theirs.state_dict())
        for batch in (1, 8):
            pixels = torch.randn(batch, 3, 224, 224, dtype=dtype)
            yield Case(
                f"{batch} x 3 x 224 x 224",
                dtype,
                "forward",
                _forward(ours, pixels),
                _forward(theirs, pixels),
            )


def _forward(model, pixels):
    def run():
        with torch.inference_mode():
            return model(pixels).pooler_output

    return run
