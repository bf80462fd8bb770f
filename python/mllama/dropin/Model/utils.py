"""`Model.utils`: the loader that takes what fits, and says what did not."""

import os

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mllama.dropin._loading import load_older
from mllama.processing.tokenizer import Tokenizer

__all__ = ["load_hf_model"]


def load_hf_model(
    model_path: str | os.PathLike, device: str | torch.device = "cpu"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase | Tokenizer]:
    """Load a model and its tokenizer, which pads on the right, and print what was converted, tied,
    skipped and missing.

    Args:
        model_path: what `mllama.load_hf_model` takes.
        device: where the weights go.

    Returns:
        The model, in eval mode, of a class that takes `kv_cache`; and the tokenizer. Tensors of
        unknown names or other shapes are skipped; a missing output head is tied to the embeddings,
        and what else is missing is initialised afresh.

    Raises:
        FileNotFoundError: no such model, or one without tokenizer files.
        ValueError: broken files.
    """
    return load_older(model_path, device, strict=False)
