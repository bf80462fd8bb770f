"""`mllama ask PICTURE ... QUESTION`."""

import argparse
import functools
import json
import os
import sys

from mllama.api import check_images, check_question, check_room, encode, refuse_swapped, say_loaded
from mllama.cli._answering import facts, load_model, read_images, reply


def run(arguments: argparse.Namespace) -> None:
    """Print the answer: word by word, or as one JSON object."""
    *paths, question = arguments.words
    refuse_swapped(paths, question)
    if os.path.isfile(question):
        raise ValueError(f"QUESTION is missing after {question}")
    if question == "-":
        question = _read_question(paths)
    check_question(question)
    pictures = read_images(arguments, paths)
    model, processor, options = load_model(arguments)
    check_images(model, pictures)
    inputs = encode(processor, pictures, question, system=arguments.system)
    check_room(model, inputs)
    begin = functools.partial(say_loaded, arguments.model, model)
    said = reply(model, processor, inputs, options, begin, show=not arguments.json)
    if arguments.json:
        shown = {"picture": paths[0] if len(paths) == 1 else paths or None, "question": question}
        print(
            json.dumps(shown | facts(arguments, model, said))
        )  # in ASCII, which every stdout takes


def _read_question(paths: list[str]) -> str:
    """From stdin."""
    if "-" in paths:
        raise ValueError("stdin, '-', can be read once")
    if sys.stdin is None:
        raise OSError("stdin is closed: there is no question to read")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # what is no text is refused as a question
    return sys.stdin.read().strip()
