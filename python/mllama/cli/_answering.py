"""Shared by `ask`, `chat` and `generate`: model, images, and streamed answers."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mllama.api import find_model, open_session
from mllama.checkpoints import open_checkpoint
from mllama.cli._status import Status
from mllama.cli._timings import timing_fields, timing_table
from mllama.device import dtype_name
from mllama.processing.image import load_image
from mllama.quant.packer import packing_of
from mllama.runtime.completion import Completion
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.session import Session

if TYPE_CHECKING:
    from PIL import Image

    from mllama.hf.answering import GenerateSession

    AnySession = Session | GenerateSession


class Loaded(NamedTuple):
    """What answers questions.

    Attributes:
        session: the model's session.
        options: options of `Session.generate`.
        status: shows the session's progress.
        seconds: the time it took to load.
    """

    session: "AnySession"
    options: dict[str, Any]
    status: Status
    seconds: float


def load_session(arguments: argparse.Namespace) -> Loaded:
    """Open the session for a command line's model. The caller calls `say_loaded`, after its last
    check.
    """
    options = sampling(arguments)
    check_reference(arguments)
    start = time.perf_counter()
    with Status(streams=not arguments.json) as status:
        session = open_session(
            arguments.model,
            arguments.dtype,
            arguments.device,
            arguments.reference or "meta",
            arguments.adapter,
            arguments.weights,
            status,
            arguments.draft_model,
            arguments.gpu_layers,
            kv_cache=arguments.kv_cache,
            image_cache=image_cache(arguments),
            prompt_lookup_tokens=arguments.prompt_lookup,
        )
    return Loaded(session, options, status, time.perf_counter() - start)


def image_cache(arguments: argparse.Namespace) -> ImageCache | None:
    """The cache with the files of --image-cache; None for the session's own, in memory."""
    return None if arguments.image_cache is None else ImageCache(folder=arguments.image_cache)


def check_reference(arguments: argparse.Namespace) -> None:
    """Reject `--reference meta` for another family than Llama-3.2-Vision.

    Raises:
        ValueError: the model is not a Llama-3.2-Vision.
    """
    if arguments.reference == "meta":
        with (opened := open_checkpoint(find_model(arguments.model))).source:
            refuse_meta(opened.family.name)


def refuse_meta(family: str) -> None:
    """`check_reference` for an open model.

    Raises:
        ValueError: `family` is another.
    """
    if family != "mllama":
        raise ValueError(
            f"--reference meta is for Llama-3.2-Vision only; this model is a {family}, computed "
            "as in transformers"
        )


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seed torch and return the options of `Session.generate`.

    Raises:
        ValueError: an option has no effect with the others.
    """
    options = {
        name: getattr(arguments, name)
        for name in ("max_new_tokens", "temperature", "top_p", "top_k")
    }
    wanted = [
        name
        for name, neutral in (("top_p", 1), ("top_k", 0))
        if options[name] not in (None, neutral)
    ]
    if getattr(arguments, "do_sample", False):
        options["do_sample"] = True
        wanted.append("do_sample")
    if options["temperature"] == 0 and wanted:
        raise ValueError(
            f"{_option(wanted[0])} has no effect with --temperature 0, which takes the likeliest "
            "token"
        )
    if arguments.seed is not None:
        if not options["temperature"] and not wanted:
            raise ValueError(
                "--seed has no effect without sampling: give --temperature, --top-p or --top-k too"
            )
        torch.manual_seed(arguments.seed)
    return {name: value for name, value in options.items() if value is not None}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_images(arguments: argparse.Namespace, paths: list[str]) -> "list[Image.Image]":
    """Load the images of a command line, before the model, so that errors come at once. "-" is
    stdin.
    """
    if paths.count("-") > 1:
        raise ValueError("stdin, '-', can be read only once")
    if "-" in paths and sys.stdin is None:
        raise OSError("stdin is closed: there is no image to read")
    return [
        load_image(sys.stdin.buffer if path == "-" else path, arguments.allow_urls)
        for path in paths
    ]


class Reply(NamedTuple):
    """An answer.

    Attributes:
        text: its text.
        tokens: number of its tokens.
        seconds: the time it took.
        stopped: whether Ctrl-C stopped it.
        timings: its fields of --timings.
        completion: all of it.
    """

    text: str
    tokens: int
    seconds: float
    stopped: bool
    timings: dict[str, Any]
    completion: Completion


def reply(
    arguments: argparse.Namespace,
    loaded: Loaded,
    inputs: Mapping[str, torch.Tensor],
    begin: Callable[[], None] = lambda: None,
    stoppable: bool = False,
) -> Reply:
    """Generate an answer and stream it to stdout, unless it is printed as JSON. Then print its
    timings or, to a terminal, its speed.

    Args:
        arguments: the command line.
        loaded: what answers.
        inputs: what the session's processor returned.
        begin: called at the first token. Errors before it leave one line on stderr.
        stoppable: Ctrl-C ends the answer and returns the text so far.
    """
    show, begun = not arguments.json, False

    def write(row: int, text: str) -> None:
        nonlocal begun
        if not begun:
            begun = True
            loaded.status.clear()
            begin()
        if show:
            print(text, end="", flush=bool(text))

    with loaded.status:
        made = loaded.session.generate(
            inputs, on_text=write, interruptible=stoppable, **loaded.options
        )
    if show and begun:
        print()
    found = made.completions[0]
    answer = Reply(
        (found.text or "").strip(),
        len(found.token_ids),
        round(made.timings.total_seconds, 3),
        found.finish_reason == "interrupted",
        timing_fields(loaded.seconds, made),
        found,
    )
    if show and arguments.timings:
        print(timing_table(answer.timings), file=sys.stderr)
    elif sys.stderr.isatty() and made.timings.decode.rate is not None:
        print(
            f"mllama: {answer.tokens} tokens, {made.timings.decode.rate:.1f} tokens/s; "
            f"{made.num_prompt_tokens - made.num_reused_tokens} tokens read in "
            f"{made.timings.first_token_seconds:.2f} s",
            file=sys.stderr,
        )
    return answer


def facts(arguments: argparse.Namespace, session: "AnySession", answer: Reply) -> dict[str, Any]:
    """The fields of --json that every answer has."""
    first = next(session.model.parameters())
    found = {
        "answer": answer.text,
        "tokens": answer.tokens,
        "seconds": answer.seconds,
        "model": arguments.model or "embedded",
        "dtype": dtype_name(first.dtype),
        "device": str(first.device),
        "weights": packing_of(session.model),
    }
    return found | ({"timings": answer.timings} if arguments.timings else {})
