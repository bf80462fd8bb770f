"""Llama-3.2-Vision's encoder at 560 pixels: three of its forty layers (two local, one global), on
images of one and of four tiles.
"""

from collections.abc import Iterator

import torch
from transformers import MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import MllamaVisionModel

from benchmarks.harness import Case
from mllama.encoders.tiled_vit import TiledImageEncoder

PEER = "transformers' MllamaVisionModel"
CONFIG = MllamaVisionConfig(
    image_size=560,
    num_hidden_layers=2,
    num_global_layers=1,
    intermediate_layers_indices=[1],
    vision_output_dim=2560,
)


def cases() -> Iterator[Case]:
    """One image in bfloat16, the released dtype. Ours reads intermediate layers as transformers
    does (reference="hf").
    """
    theirs = MllamaVisionModel(CONFIG).bfloat16().eval()
    ours = TiledImageEncoder(CONFIG).bfloat16().eval()
    ours.load_state_dict(theirs.state_dict())
    pixels = torch.randn(1, 1, 4, 3, 560, 560, dtype=torch.bfloat16)
    for tiles, ratio in ((1, 1), (4, 6)):
        mask = (torch.arange(4) < tiles).long().view(1, 1, 4)
        inputs = (pixels * mask.view(1, 1, 4, 1, 1, 1), torch.tensor([[ratio]]), mask)
        yield Case(
            f"{tiles} of 4 tiles, 560 px, 2 + 1 layers",
            torch.bfloat16,
            "forward",
            _without_gradients(lambda inputs=inputs: ours(*inputs, reference="hf")),
            _without_gradients(lambda inputs=inputs: theirs(*inputs)),
        )


def _without_gradients(call):
    def run():
        with torch.inference_mode():
            return call()

    return run
