"""The one maker of tiny models with random weights: ours (`tiny.model`), stock transformers'
(`tiny.stock`), both with the same weights (`tiny.pairs`), and their folders (`tiny.folders`).
"""

from tiny.batches import batch, images, tokens
from tiny.models import close, config, model, randomize, twin
from tiny.sizes import ENDS, IMAGE, LLAMA3, PATCHES, SIZES, TEXT, VISION, VOCAB_SIZE, tiled_vision

__all__ = [
    "ENDS",
    "IMAGE",
    "LLAMA3",
    "PATCHES",
    "SIZES",
    "TEXT",
    "VISION",
    "VOCAB_SIZE",
    "batch",
    "close",
    "config",
    "images",
    "model",
    "randomize",
    "tiled_vision",
    "tokens",
    "twin",
]
