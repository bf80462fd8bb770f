"""`mllama generate --prompt TEXT [--image FILE ...]`."""

import argparse
import functools
import inspect
import json
from collections.abc import Mapping, Sequence

from mllama.api import say_loaded
from mllama.cli._answering import facts, load_session, read_images, reply
from mllama.cli._parser import SIZES
from mllama.processing.conversation import encode_messages, encode_raw
from mllama.runtime.checks import check_room
from mllama.runtime.questions import check_images, check_question, check_system


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation of a prompt, streamed or as one JSON object."""
    check_question(arguments.prompt)
    if arguments.raw and arguments.system is not None:
        raise ValueError("--system has no place with --raw, which leaves the chat template out")
    images = read_images(arguments, arguments.image)
    if arguments.size:
        arguments.model = SIZES[arguments.size]
    stock = arguments.runtime == "transformers"
    if stock:
        from mllama.cli._stock import load_stock_session as load  # slow to import
    else:
        load = load_session
    session = (loaded := load(arguments)).session
    check_images(session, images)
    inputs = _encode(session.processor, arguments, images)
    if stock:
        for name in inputs.keys() - inspect.signature(session.model.forward).parameters.keys():
            del inputs[name]
    check_room(session.context, inputs["input_ids"].shape[1])
    begin = functools.partial(say_loaded, arguments.model, session.model)
    answer = reply(arguments, loaded, inputs, begin)
    if arguments.json:
        shown = {"prompt": arguments.prompt, "images": arguments.image}
        print(json.dumps(shown | facts(arguments, session, answer)))


def _encode(processor, arguments: argparse.Namespace, images: Sequence) -> Mapping:
    prompt = arguments.prompt
    if arguments.system is not None:
        check_system(processor, arguments.system)
    if not arguments.raw:
        system = (
            [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
        )
        return encode_messages(processor, [*system, {"role": "user", "content": prompt}], images)
    return encode_raw(processor, prompt, images)
