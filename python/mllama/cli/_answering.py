"""What `ask`, `chat` and `generate` share: the model their options name, and answers written while they are generated."""

import argparse
from collections.abc import Callable

import torch
from transformers import TextStreamer

from mllama.api import check_answers, load_quietly, tokenizer_of


def load_model(arguments: argparse.Namespace):
    """(model, processor, generate's options) as the command line says. `say_loaded` is left to the caller, after its last check."""
    more = {} if arguments.adapter is None else {"adapter": arguments.adapter}
    model, processor = load_quietly(arguments.model, arguments.dtype, arguments.device, arguments.reference, **more)
    check_answers(model)
    return model, processor, sampling(arguments)


def sampling(arguments: argparse.Namespace) -> dict:
    """generate's options; sows the seed."""
    if arguments.seed is not None:
        torch.manual_seed(arguments.seed)
    return {name: getattr(arguments, name) for name in ("max_new_tokens", "temperature", "top_p", "top_k")}


class AnswerStreamer(TextStreamer):
    """Writes an answer to stdout, word by word.

    Args:
        processor: the model's.
        begin: called once the first token is there: until then something may be refused, and its error shall be the one line on stderr.
    """

    def __init__(self, processor, begin: Callable[[], None] = lambda: None):
        super().__init__(tokenizer_of(processor), skip_prompt=True, skip_special_tokens=True)
        self._begin = begin

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by TextStreamer with what can be shown."""
        begin, self._begin = self._begin, lambda: None
        begin()
        super().on_finalized_text(text, stream_end)
