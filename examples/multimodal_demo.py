"""Combine an image and a text by hand: pool patches to a few visual tokens, project them to the
decoder's width, and put them before the text.

`MllamaConfig(fusion="prepend")` does the same in one model. The decoder uses the names of older
scripts (docs/older-scripts.md). The encoder is the embedded model's; the projection and the decoder
are small and random, so this shows shapes and no meaningful answer.
"""

from pathlib import Path

import torch
from torch import nn

import mllama
from mllama.dropin.config import LLAMA32_CONFIG
from mllama.dropin.text import Llama3Model
from mllama.processing.image import load_image

IMAGE = Path(__file__).parent / "pictures" / "drawn.png"
VISUAL_TOKENS = 8
SIZES = {
    "context_length": 256,
    "emb_dim": 128,
    "n_heads": 4,
    "n_layers": 2,
    "hidden_dim": 256,
    "n_kv_groups": 2,
}
# RoPE scaling is for much longer contexts
OTHERS = {"rope_freq": None, "dtype": torch.float32}


@torch.no_grad()
def main() -> torch.Tensor:
    """Print the shapes of every step and return the logits."""
    torch.manual_seed(0)
    embedded, processor = mllama.load(dtype="float32", device="cpu")
    decoder = Llama3Model(
        LLAMA32_CONFIG | SIZES | OTHERS | {"vocab_size": len(processor.tokenizer)}
    ).eval()
    pool = nn.AdaptiveAvgPool1d(VISUAL_TOKENS)
    project = nn.Linear(embedded.config.vision_config.hidden_size, SIZES["emb_dim"])

    pixel_values = processor.image_processor(load_image(IMAGE), return_tensors="pt")["pixel_values"]
    patches = embedded.vision_tower(pixel_values).last_hidden_state
    visual = project(pool(patches.mT).mT)
    ids = processor.tokenizer("How many circles?", return_tensors="pt")["input_ids"]
    text = decoder.tok_emb(ids)
    logits = decoder.forward_with_embeds(torch.cat([visual, text], dim=1))

    steps = {
        "image": pixel_values,
        "patches": patches,
        "visual tokens": visual,
        "text": text,
        "logits": logits,
    }
    for name, value in steps.items():
        print(f"{name:14}{list(value.shape)}")
    print(f"next token    {processor.tokenizer.decode(logits[0, -1].argmax().item())!r}")
    return logits


if __name__ == "__main__":
    main()
