"""`mllama chat [PICTURE]`."""

import argparse
import sys
from collections.abc import Iterator, Mapping

import torch

from mllama.api import MAX_NEW_TOKENS, answer, check_room, encode, room_left, say_loaded, tokenizer_of
from mllama.cli import complain
from mllama.cli._answering import AnswerStreamer, load_model
from mllama.processing.image import load_picture

_PICTURE = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")  # arguments of get_image_features


def run(arguments: argparse.Namespace) -> None:
    """Answer questions from stdin, each in the light of those before; the oldest are forgotten when the model's context is full.

    Without a chat template (PaliGemma) every question stands alone. A question that cannot be put is told of on stderr, and the next one is
    read.
    """
    if sys.stdin is None:
        raise OSError("stdin is closed: there are no questions to read")
    picture, features, turns = None if arguments.picture is None else load_picture(arguments.picture), None, []
    model, processor, options = load_model(arguments)
    if picture is not None and tokenizer_of(processor) is processor:
        raise ValueError("this model takes no pictures, got 1")
    say_loaded(arguments.model, model)
    for question in _questions():
        try:
            inputs, kept = _fit(model, processor, picture, question, turns)
        except ValueError as error:
            complain(error)
            continue
        if picture is not None:  # it is encoded once
            if features is None:
                with torch.inference_mode():
                    features = model.get_image_features(**{name: inputs[name].to(model.device) for name in _PICTURE if name in inputs})
            del inputs["pixel_values"]
            inputs["image_features"] = features
        result = answer(model, processor, inputs, streamer=AnswerStreamer(processor), **options)
        turns = [*kept, (question, result.text)] if processor.chat_template else []


def _fit(model, processor, picture, question: str, turns: list) -> tuple[Mapping, list]:
    """The inputs and the newest turns that leave room for an answer. `turns` stays: a refused question must not cost the conversation."""
    inputs = encode(processor, picture, question, turns)
    while turns and room_left(model, inputs) < MAX_NEW_TOKENS:
        turns = turns[1:]
        inputs = encode(processor, picture, question, turns)
    check_room(model, inputs)
    return inputs, turns


def _questions() -> Iterator[str]:
    """Lines of stdin that say something, up to /exit; with a prompt where somebody types them."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused as a question, not as the end of reading
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line
