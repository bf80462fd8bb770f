"""`mllama generate --prompt TEXT [--image FILE ...]`."""

import argparse
import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mllama.api import (
    check_answers,
    check_images,
    find_model,
    load_quietly,
    processor_of,
    resolve_dtype,
    say_loaded,
)
from mllama.checkpoints import open_checkpoint
from mllama.cli._answering import check_reference, facts, read_images, reply, sampling, working
from mllama.cli._parser import SIZES
from mllama.device import choose_device
from mllama.hf.answering import GenerateSession
from mllama.hf.models import survey_opened
from mllama.hf.processors.auto import load_processor
from mllama.hf.stock import load_stock
from mllama.processing.conversation import encode_messages
from mllama.runtime.questions import check_question, check_system, tokenizer_of
from mllama.runtime.session import Session, check_room

if TYPE_CHECKING:
    from mllama.cli._answering import AnySession


def run(arguments: argparse.Namespace) -> None:
    """Print the continuation of a prompt, streamed or as one JSON object."""
    check_question(arguments.prompt)
    if arguments.raw and arguments.system is not None:
        raise ValueError("--system has no place with --raw, which leaves the chat template out")
    images = read_images(arguments, arguments.image)
    if arguments.size:
        arguments.model = SIZES[arguments.size]
    stock = arguments.runtime == "transformers"
    session, options = (_load_stock if stock else _load)(arguments)
    check_images(session, images)
    inputs = _encode(session.processor, arguments, images)
    if stock:
        for name in inputs.keys() - inspect.signature(session.model.forward).parameters.keys():
            del inputs[name]
    check_room(session.context, inputs["input_ids"].shape[1])
    begin = functools.partial(say_loaded, arguments.model, session.model)
    answer = reply(session, inputs, options, begin, show=not arguments.json)
    if arguments.json:
        shown = {"prompt": arguments.prompt, "images": arguments.image}
        print(json.dumps(shown | facts(arguments, session, answer)))


def _load(arguments: argparse.Namespace) -> "tuple[AnySession, dict[str, Any]]":
    options = sampling(arguments)
    check_reference(arguments)
    with working("loading the model"):
        model, processor = load_quietly(
            arguments.model,
            arguments.dtype,
            arguments.device,
            arguments.reference or "meta",
            arguments.adapter,
            arguments.weights,
        )
    check_answers(model)
    if arguments.kv_cache is None:
        return GenerateSession(model, processor), options
    settings = model.generation_config.to_dict()
    return Session(model, processor, settings, kv_cache=arguments.kv_cache), options


def _load_stock(arguments: argparse.Namespace) -> tuple[GenerateSession, dict[str, Any]]:
    for name in ("adapter", "weights", "kv_cache"):
        if getattr(arguments, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} needs --runtime mllama")
    options = sampling(arguments)
    check_reference(arguments)
    if arguments.reference == "meta":
        raise ValueError(
            "--runtime transformers follows its own Llama-3.2-Vision: --reference must be hf, got "
            "meta"
        )
    folder, device = find_model(arguments.model), choose_device(arguments.device)
    with (opened := open_checkpoint(folder)).source:
        model, report = survey_opened(opened)
        check_answers(model)
        report.check(opened.source.where)  # transformers would initialize what is missing
        dtype = resolve_dtype(opened, arguments.dtype, device)
    with working("loading the model"):
        model = load_stock(folder, dtype).to(device)
        return GenerateSession(model, processor_of(folder, load_processor)), options


def _encode(processor, arguments: argparse.Namespace, images: Sequence) -> Mapping:
    prompt = arguments.prompt
    if arguments.system is not None:
        check_system(processor, arguments.system)
    if not arguments.raw:
        system = (
            [] if arguments.system is None else [{"role": "system", "content": arguments.system}]
        )
        return encode_messages(processor, [*system, {"role": "user", "content": prompt}], images)
    if tokenizer_of(processor) is processor:
        if images:
            raise ValueError(f"this model takes no images, got {len(images)}")
        return processor(prompt, return_tensors="pt")
    return processor(text=[prompt], images=[images] if images else None, return_tensors="pt")
