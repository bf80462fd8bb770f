"""`mllama ask PICTURE QUESTION`."""

import argparse
import functools
import json
import time

from mllama._device import dtype_name
from mllama.api import answer, check_question, check_room, encode, say_loaded
from mllama.cli._answering import AnswerStreamer, load_model
from mllama.processing.image import load_picture


def run(arguments: argparse.Namespace) -> None:
    """Print the answer: word by word, or as one JSON object."""
    check_question(arguments.question)  # this and the picture before the model: an error should not take its time
    picture = load_picture(arguments.picture)
    model, processor, options = load_model(arguments)
    start = time.perf_counter()
    inputs = encode(processor, picture, arguments.question)
    check_room(model, inputs)
    say = functools.partial(say_loaded, arguments.model, model)
    result = answer(model, processor, inputs, streamer=None if arguments.json else AnswerStreamer(processor, say), **options)
    if arguments.json:
        say()
        said = {
            "picture": arguments.picture,
            "question": arguments.question,
            "answer": result.text,
            "tokens": result.tokens,
            "seconds": round(time.perf_counter() - start, 3),
            "model": arguments.model or "embedded",
            "dtype": dtype_name(model.dtype),
            "device": str(model.device),
        }
        print(json.dumps(said))  # in ASCII, which every stdout takes
