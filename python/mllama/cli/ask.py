"""`mllama ask IMAGE ... QUESTION`."""

import argparse
import functools
import json
import os
import sys

from mllama.api import say_loaded
from mllama.cli._answering import facts, load_session, read_images, reply
from mllama.runtime.checks import check_room
from mllama.runtime.questions import check_images, check_question, encode, refuse_swapped


def run(arguments: argparse.Namespace) -> None:
    """Print the answer, streamed or as one JSON object."""
    *paths, question = arguments.words
    refuse_swapped(paths, question)
    if os.path.isfile(question):
        raise ValueError(f"QUESTION is missing after {question}")
    if question == "-":
        question = _read_question(paths)
    check_question(question)
    images = read_images(arguments, paths)
    session = (loaded := load_session(arguments)).session
    check_images(session, images)
    inputs = encode(session.processor, images, question, system=arguments.system)
    check_room(session.context, inputs["input_ids"].shape[1])
    begin = functools.partial(say_loaded, arguments.model, session.model)
    answer = reply(arguments, loaded, inputs, begin)
    if arguments.json:
        shown = {"image": paths[0] if len(paths) == 1 else paths or None, "question": question}
        # ASCII, which every stdout can encode
        print(json.dumps(shown | facts(arguments, session, answer)))


def _read_question(paths: list[str]) -> str:
    """Read the question from stdin."""
    if "-" in paths:
        raise ValueError("stdin, '-', can be read only once")
    if sys.stdin is None:
        raise OSError("stdin is closed: there is no question to read")
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(errors="surrogateescape")  # invalid text is rejected as a question
    return sys.stdin.read().strip()
