"""`mllama chat PICTURE`."""

import argparse
import sys
from collections.abc import Iterator

import torch

from mllama.api import MAX_NEW_TOKENS, answer, encode, room_left
from mllama.cli._answering import load_model, streamer
from mllama.processing.image import load_picture


def run(arguments: argparse.Namespace) -> None:
    """Answer questions from stdin, each in the light of those before; the oldest are forgotten when the model's context is full."""
    picture, features, turns = load_picture(arguments.picture), None, []
    model, processor, options = load_model(arguments)
    for question in _questions():
        inputs = encode(processor, picture, question, turns)
        while turns and room_left(model, inputs) < MAX_NEW_TOKENS:
            turns.pop(0)
            inputs = encode(processor, picture, question, turns)
        if features is None:  # the picture is encoded once
            with torch.inference_mode():
                features = model.get_image_features(inputs["pixel_values"].to(model.device))
        del inputs["pixel_values"]
        inputs["image_features"] = features
        result = answer(model, processor, inputs, streamer=streamer(processor), **options)
        turns.append((question, result.text))


def _questions() -> Iterator[str]:
    """Lines of stdin that say something, up to /exit; with a prompt where somebody types them."""
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
