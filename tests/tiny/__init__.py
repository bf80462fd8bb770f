"""The one maker of tiny models with random weights: ours (`tiny.model`), stock transformers'
(`tiny.stock`), both with the same weights (`tiny.pairs`), and their folders (`tiny.folders`).
"""

from tiny.batches import batch, images, texts, tokens
from tiny.models import close, config, crossed, model, prepend, randomize, twin
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
    "crossed",
    "images",
    "model",
    "prepend",
    "randomize",
    "texts",
    "tiled_vision",
    "tokens",
    "twin",
]
