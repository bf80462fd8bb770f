"""What `ask` and `chat` share: the model their options name, and answers written while they are generated."""

import argparse

import torch
from transformers import TextStreamer

from mllama.api import load_quietly


def load_model(arguments: argparse.Namespace):
    """(model, processor, generate's options) as the command line says. `say_loaded` is left to the caller, after its last check."""
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    model, processor = load_quietly(arguments.model, arguments.dtype, arguments.device)
    options = {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}
    return model, processor, options


def streamer(processor) -> TextStreamer:
    """Writes an answer to stdout, word by word."""
    return TextStreamer(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
