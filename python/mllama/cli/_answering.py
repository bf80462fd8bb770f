"""What `ask`, `chat` and `generate` share: the model their options name, images, and answers
written while they are generated.
"""

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
from mllama.runtime.session import Session

if TYPE_CHECKING:
    from PIL import Image

    from mllama.hf.answering import GenerateSession

    AnySession = Session | GenerateSession


def load_session(arguments: argparse.Namespace) -> "tuple[AnySession, dict[str, Any]]":
    """A session of the model that the command line names, and the options of its answers.
    `say_loaded` is left to the caller, after its last check.
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
        )
    return session, options


def check_reference(arguments: argparse.Namespace) -> None:
    """Refuse `--reference meta` where there is no such thing.

    Raises:
        ValueError: the model is no Llama-3.2-Vision.
    """
    if arguments.reference == "meta":
        with (opened := open_checkpoint(find_model(arguments.model))).source:
            refuse_meta(opened.family.name)


def refuse_meta(family: str) -> None:
    """`check_reference` for a model that is open.

    Raises:
        ValueError: the family is another.
    """
    if family != "mllama":
        raise ValueError(
            f"--reference meta is of Llama-3.2-Vision alone; this model is a {family}, and "
            "computed as transformers does"
        )


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """Seed torch and return the options of `Session.generate`.

    Raises:
        ValueError: an option that would change nothing beside the others.
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
            f"{_option(wanted[0])} has no effect beside --temperature 0, which takes the likeliest "
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
    """The images of a command line, before the model: an error should not take its time. "-" is
    stdin.
    """
    if paths.count("-") > 1:
        raise ValueError("stdin, '-', can be read once")
    return [
        load_image(sys.stdin.buffer if path == "-" else path, arguments.allow_urls)
        for path in paths
    ]


class Reply(NamedTuple):
    """An answer: its text, its tokens, the seconds it took, and whether Ctrl-C stopped it."""

    text: str
    tokens: int
    seconds: float
    stopped: bool = False


def reply(
    session: "AnySession",
    inputs: Mapping[str, torch.Tensor],
    options: dict[str, Any],
    begin: Callable[[], None] = lambda: None,
    show: bool = True,
    stoppable: bool = False,
) -> Reply:
    """Generate an answer, on stdout as it comes.

    Args:
        session, inputs: the model's, and what its processor returned.
        options: of `Session.generate`.
        begin: called once the first token is there: until then something may be refused, and its
            error shall be the one line on stderr.
        show: False writes nothing to stdout.
        stoppable: Ctrl-C ends the answer and gives what there is of it.
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
    return Reply((found.text or "").strip(), tokens, round(end - start, 3), stopped)


def facts(arguments: argparse.Namespace, session: "AnySession", said: Reply) -> dict[str, Any]:
    """What --json tells of every answer."""
    first = next(session.model.parameters())
    return {
        "answer": said.text,
        "tokens": said.tokens,
        "seconds": said.seconds,
        "model": arguments.model or "embedded",
        "dtype": dtype_name(first.dtype),
        "device": str(first.device),
    }


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[], None]]:
    """A line on stderr, where that is a terminal, that says what takes its time; gone at the end,
    or when what is yielded is called.
    """
    if not sys.stderr.isatty():
        yield lambda: None
        return
    from tqdm import tqdm  # here, since it takes its time

    line = tqdm(desc=f"mllama: {what} ...", bar_format="{desc}", leave=False, file=sys.stderr)
    try:
        yield line.close
    finally:
        line.close()
