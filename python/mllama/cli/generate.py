"""`mllama generate --prompt TEXT [--image FILE ...]`."""

import argparse
import functools
import inspect
from collections.abc import Mapping, Sequence

from mllama._device import choose_device
from mllama.api import (
    answer,
    check_answers,
    check_question,
    check_room,
    find_model,
    model_class,
    processor_of,
    resolve_dtype,
    say_loaded,
    tokenizer_of,
)
from mllama.checkpoints import open_checkpoint
from mllama.checkpoints.models import survey
from mllama.cli._answering import AnswerStreamer, load_model, sampling
from mllama.cli._parser import SIZES
from mllama.cli._stock import load_stock
from mllama.processing.auto import encode_messages
from mllama.processing.image import load_picture


def run(arguments: argparse.Namespace) -> None:
    """Print what comes after the prompt, word by word."""
    check_question(arguments.prompt)
    pictures = [load_picture(path) for path in arguments.image]
    if arguments.size:
        arguments.model = SIZES[arguments.size]
    model, processor, options = (load_model if arguments.runtime == "mllama" else _load_stock)(arguments)
    inputs = _encode(processor, arguments.prompt, pictures, arguments.raw)
    if arguments.runtime == "transformers":
        for name in inputs.keys() - inspect.signature(model.forward).parameters.keys():
            del inputs[name]
    check_room(model, inputs)
    if arguments.do_sample:
        options["do_sample"] = True
    streamer = AnswerStreamer(processor, functools.partial(say_loaded, arguments.model, model))
    answer(model, processor, inputs, streamer=streamer, **options)


def _load_stock(arguments: argparse.Namespace):
    if arguments.adapter is not None:
        raise ValueError("--adapter needs --runtime mllama")
    folder, device = find_model(arguments.model), choose_device(arguments.device)
    with (opened := open_checkpoint(folder)).source:
        model, report = survey(model_class(opened.config), opened)
        check_answers(model)
        report.check(opened.source.where)  # transformers would make up what is missing
        dtype = resolve_dtype(opened, arguments.dtype, device)
    return load_stock(folder, dtype).to(device), processor_of(folder), sampling(arguments)


def _encode(processor, prompt: str, pictures: Sequence, raw: bool) -> Mapping:
    if not raw:
        return encode_messages(processor, [{"role": "user", "content": prompt}], pictures)
    if tokenizer_of(processor) is processor:
        if pictures:
            raise ValueError(f"this model takes no pictures, got {len(pictures)}")
        return processor(prompt, return_tensors="pt")
    return processor(text=[prompt], images=[pictures] if pictures else None, return_tensors="pt")
