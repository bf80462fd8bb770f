"""Joins a picture and a text by hand: patches are pooled to a few visual tokens, projected to the
decoder's width and put before the text.

`fusion="prepend"` in MllamaConfig is the same in one model. The decoder goes by older scripts'
names (docs/older-scripts.md).

The picture is looked at by the embedded model's tower; projection and decoder are small and random:
this shows shapes, not knowledge.
"""

from pathlib import Path

import torch
from torch import nn

import mllama
from mllama.dropin.config import LLAMA32_CONFIG
from mllama.dropin.text import Llama3Model
from mllama.processing.image import load_picture

PICTURE = Path(__file__).parent / "pictures" / "drawn.png"
VISUAL_TOKENS = 8
SIZES = {
    "context_length": 256,
    "emb_dim": 128,
    "n_heads": 4,
    "n_layers": 2,
    "hidden_dim": 256,
    "n_kv_groups": 2,
}
OTHERS = {
    "rope_freq": None,
    "dtype": torch.float32,
}  # frequencies are scaled for contexts far longer than this one


@torch.no_grad()
def main() -> torch.Tensor:
    """Print what comes out of every step; returns the logits."""
    torch.manual_seed(0)
    embedded, processor = mllama.load(dtype="float32", device="cpu")
    decoder = Llama3Model(
        LLAMA32_CONFIG | SIZES | OTHERS | {"vocab_size": len(processor.tokenizer)}
    ).eval()
    pool = nn.AdaptiveAvgPool1d(VISUAL_TOKENS)
    project = nn.Linear(embedded.config.vision_config.hidden_size, SIZES["emb_dim"])

    pixel_values = processor.image_processor(load_picture(PICTURE), return_tensors="pt")[
        "pixel_values"
    ]
    patches = embedded.vision_tower(pixel_values).last_hidden_state
    visual = project(pool(patches.mT).mT)
    ids = processor.tokenizer("How many circles?", return_tensors="pt")["input_ids"]
    text = decoder.tok_emb(ids)
    logits = decoder.forward_with_embeds(torch.cat([visual, text], dim=1))

    steps = {
        "picture": pixel_values,
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
