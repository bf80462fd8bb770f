"""Shared by `ask`, `chat` and `generate`: model, images, and streamed answers."""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from mllama.api import find_model, open_session
from mllama.checkpoints import open_checkpoint
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


def load_session(arguments: argparse.Namespace) -> "tuple[AnySession, dict[str, Any]]":
    """The session for a command line's model, and the options of its answers. The caller calls
    `say_loaded`, after its last check.
    """
    options = sampling(arguments)
    check_reference(arguments)
    with working("loading the model"):
        session = open_session(
            arguments.model,
            arguments.dtype,
            arguments.device,
            arguments.reference or "meta",
            arguments.adapter,
            arguments.weights,
            arguments.kv_cache,
            _image_cache(arguments),
        )
    return session, options


def _image_cache(arguments: argparse.Namespace) -> ImageCache | None:
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
    return [
        load_image(sys.stdin.buffer if path == "-" else path, arguments.allow_urls)
        for path in paths
    ]


class Reply(NamedTuple):
    """An answer: its text, number of tokens, seconds, whether Ctrl-C stopped it, and all of it."""

    text: str
    tokens: int
    seconds: float
    stopped: bool
    completion: Completion


def reply(
    session: "AnySession",
    inputs: Mapping[str, torch.Tensor],
    options: dict[str, Any],
    begin: Callable[[], None] = lambda: None,
    show: bool = True,
    stoppable: bool = False,
) -> Reply:
    """Generate an answer and stream it to stdout.

    Args:
        session: the model's session.
        inputs: what its processor returned.
        options: options of `Session.generate`.
        begin: called at the first token. Errors before it leave one line on stderr.
        show: False writes nothing to stdout.
        stoppable: Ctrl-C ends the answer and returns the text so far.
    """
    prompt, start = inputs["input_ids"].shape[1], time.perf_counter()
    with working(f"reading {prompt} tokens") as clear:
        begun = False

        def write(row: int, text: str) -> None:
            nonlocal begun
            if not begun:
                begun = True
                clear()
                begin()
            if show:
                print(text, end="", flush=bool(text))

        made = session.generate(inputs, on_text=write, interruptible=stoppable, **options)
        if show and begun:
            print()
    end = time.perf_counter()
    found = made.completions[0]
    tokens, stopped = len(found.token_ids), found.finish_reason == "interrupted"
    if sys.stderr.isatty() and tokens > 1:
        speed = (tokens - 1) / max(made.decode_seconds, 1e-9)
        print(
            f"mllama: {tokens} tokens, {speed:.1f} tokens/s; "
            f"{prompt - made.num_reused_tokens} tokens read in {made.prefill_seconds:.2f} s",
            file=sys.stderr,
        )
    return Reply((found.text or "").strip(), tokens, round(end - start, 3), stopped, found)


def facts(arguments: argparse.Namespace, session: "AnySession", answer: Reply) -> dict[str, Any]:
    """The fields of --json that every answer has."""
    first = next(session.model.parameters())
    return {
        "answer": answer.text,
        "tokens": answer.tokens,
        "seconds": answer.seconds,
        "model": arguments.model or "embedded",
        "dtype": dtype_name(first.dtype),
        "device": str(first.device),
        "weights": packing_of(session.model),
    }


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[], None]]:
    """Show a progress line on stderr if that is a terminal. It is cleared at the end, or when the
    yielded function is called.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from tqdm import tqdm  # slow to import

    line = tqdm(desc=f"mllama: {what} ...", bar_format="{desc}", leave=False, file=sys.stderr)
    try:
        yield line.close
    finally:
        line.close()
