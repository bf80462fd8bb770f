"""`mllama generate --prompt TEXT [--image FILE ...]`."""

import argparse
import functools
import inspect
import json
from collections.abc import Mapping, Sequence

from mllama.api import (
    check_answers,
    check_images,
    check_question,
    check_room,
    check_system,
    find_model,
    processor_of,
    resolve_dtype,
    say_loaded,
    tokenizer_of,
)
from mllama.checkpoints import open_checkpoint
from mllama.cli._answering import (
    check_reference,
    facts,
    load_model,
    read_images,
    reply,
    sampling,
    working,
)
from mllama.cli._parser import SIZES
from mllama.device import choose_device
from mllama.hf.checkpoints import survey_opened
from mllama.hf.stock import load_stock
from mllama.processing.auto import encode_messages


def run(arguments: argparse.Namespace) -> None:
    """Print what comes after the prompt: word by word, or as one JSON object."""
    check_question(arguments.prompt)
    if arguments.raw and arguments.system is not None:
        raise ValueError("--system has no place with --raw, which leaves the chat template out")
    pictures = read_images(arguments, arguments.image)
    if arguments.size:
        arguments.model = SIZES[arguments.size]
    stock = arguments.runtime == "transformers"
    model, processor, options = (_load_stock if stock else load_model)(arguments)
    check_images(model, pictures)
    inputs = _encode(processor, arguments, pictures)
    if stock:
        for name in inputs.keys() - inspect.signature(model.forward).parameters.keys():
            del inputs[name]
    check_room(model, inputs)
    begin = functools.partial(say_loaded, arguments.model, model)
    said = reply(model, processor, inputs, options, begin, show=not arguments.json)
    if arguments.json:
        print(
            json.dumps(
                {"prompt": arguments.prompt, "images": arguments.image}
                | facts(arguments, model, said)
            )
        )


def _load_stock(arguments: argparse.Namespace):
    if arguments.adapter is not None:
        raise ValueError("--adapter needs --runtime mllama")
    options = sampling(arguments)
    check_reference(arguments)
    if arguments.reference == "meta":
        raise ValueError(
            "--runtime transformers computes Llama-3.2-Vision its own way: --reference must be hf, got meta"
        )
    folder, device = find_model(arguments.model), choose_device(arguments.device)
    with (opened := open_checkpoint(folder)).source:
        model, report = survey_opened(opened)
        check_answers(model)
        report.check(opened.source.where)  # transformers would make up what is missing
        dtype = resolve_dtype(opened, arguments.dtype, device)
    with working("loading the model"):
        return load_stock(folder, dtype).to(device), processor_of(folder), options


def _encode(processor, arguments: argparse.Namespace, pictures: Sequence) -> Mapping:
    prompt = arguments.prompt
    if arguments.system is not None:
        check_system(processor, arguments.system)
    if not arguments.raw:
        system = (
            [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
        )
        return encode_messages(processor, [*system, {"role": "user", "content": prompt}], pictures)
    if tokenizer_of(processor) is processor:
        if pictures:
            raise ValueError(f"this model takes no pictures, got {len(pictures)}")
        return processor(prompt, return_tensors="pt")
    return processor(text=[prompt], images=[pictures] if pictures else None, return_tensors="pt")
