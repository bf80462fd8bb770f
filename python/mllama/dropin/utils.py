"""`utils`: the loader that refuses files which do not fit."""

import os

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mllama.dropin._loading import load_older
from mllama.processing.tokenizer import Tokenizer

__all__ = ["load_hf_model"]


def load_hf_model(
    model_path: str | os.PathLike, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | Tokenizer]:
    """Load a model and its tokenizer, which pads on the right, and print what was converted and
    tied.

    Args:
        model_path: what `mllama.load_hf_model` takes.
        device: where the weights go.

    Returns:
        The model, in eval mode, of a class that takes `kv_cache`; and the tokenizer.

    Raises:
        FileNotFoundError: no such model, or one without tokenizer files.
        ValueError: broken files; tensors that are missing, unexpected, doubled or of another shape,
            all in one error.
    """
    return load_older(model_path, device, strict=True)
