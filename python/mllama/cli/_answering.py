"""What `ask`, `chat` and `generate` share: the model their options name, images, and answers
written while they are generated.
"""

import argparse
import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from PIL import Image
from tqdm import tqdm
from transformers import TextStreamer

from mllama.api import answer, check_answers, find_model, load_quietly, tokenizer_of
from mllama.checkpoints import open_checkpoint
from mllama.device import dtype_name
from mllama.processing.image import load_picture


def load_model(arguments: argparse.Namespace):
    """(model, processor, generate's options) as the command line says. `say_loaded` is left to the
    caller, after its last check.
    """
    options = sampling(arguments)
    check_reference(arguments)
    more = {} if arguments.adapter is None else {"adapter": arguments.adapter}
    with working("loading the model"):
        model, processor = load_quietly(
            arguments.model,
            arguments.dtype,
            arguments.device,
            arguments.reference or "meta",
            **more,
        )
    check_answers(model)
    return model, processor, options


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
            f"--reference meta is of Llama-3.2-Vision alone; this model is a {family}, and computed as transformers does"
        )


def sampling(arguments: argparse.Namespace) -> dict[str, Any]:
    """generate's options; seeds torch.

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
            f"{_option(wanted[0])} has no effect beside --temperature 0, which takes the likeliest token"
        )
    if arguments.seed is not None:
        if not options["temperature"] and not wanted:
            raise ValueError(
                "--seed has no effect without sampling: give --temperature, --top-p or --top-k too"
            )
        torch.manual_seed(arguments.seed)
    return options


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def read_images(arguments: argparse.Namespace, paths: list[str]) -> list[Image.Image]:
    """The images of a command line, before the model: an error should not take its time. "-" is
    stdin.
    """
    if paths.count("-") > 1:
        raise ValueError("stdin, '-', can be read once")
    return [
        load_picture(sys.stdin.buffer if path == "-" else path, arguments.allow_urls)
        for path in paths
    ]


class Reply(NamedTuple):
    """An answer: its text, its tokens, the seconds it took, and whether Ctrl-C stopped it."""

    text: str
    tokens: int
    seconds: float
    stopped: bool = False


def reply(
    model,
    processor,
    inputs: Mapping,
    options: dict,
    begin: Callable[[], None] = lambda: None,
    show: bool = True,
    stoppable: bool = False,
) -> Reply:
    """Generate an answer, on stdout word by word.

    Args:
        model, processor, inputs: as `mllama.api.answer` takes them.
        options: generate's.
        begin: called once the first token is there.
        show: False writes nothing to stdout.
        stoppable: Ctrl-C ends the answer and gives what there is of it.
    """
    prompt, start = inputs["input_ids"].shape[1], time.perf_counter()
    with working(f"reading {prompt} tokens") as clear:

        def first() -> None:
            clear()
            begin()

        streamer = AnswerStreamer(processor, first, show)
        beams = (
            model.generation_config.num_beams or 1
        ) > 1  # the model's own setting; generate streams none of them
        try:
            found = answer(
                model, processor, inputs, streamer=None if beams else streamer, **options
            )
            if beams:
                first()
                if show:
                    print(found.text)
            text, tokens, stopped = found.text, found.tokens, False
        except KeyboardInterrupt:
            if not stoppable:
                raise
            streamer.end()  # writes what is still held back, and a line's end
            text, tokens, stopped = streamer.said.strip(), streamer.tokens, True
    end = time.perf_counter()
    if sys.stderr.isatty() and streamer.tokens > 1:
        speed = (tokens - 1) / max(end - streamer.first, 1e-9)
        print(
            f"mllama: {tokens} tokens, {speed:.1f} tokens/s; {prompt} tokens read in {streamer.first - start:.2f} s",
            file=sys.stderr,
        )
    return Reply(text, tokens, round(end - start, 3), stopped)


def facts(arguments: argparse.Namespace, model, said: Reply) -> dict[str, Any]:
    """What --json tells of every answer."""
    return {
        "answer": said.text,
        "tokens": said.tokens,
        "seconds": said.seconds,
        "model": arguments.model or "embedded",
        "dtype": dtype_name(model.dtype),
        "device": str(model.device),
    }


@contextlib.contextmanager
def working(what: str) -> Iterator[Callable[[], None]]:
    """A line on stderr, where that is a terminal, that says what takes its time; gone at the end,
    or when what is yielded is called.
    """
    line = tqdm(
        desc=f"mllama: {what} ...", bar_format="{desc}", leave=False, disable=None, file=sys.stderr
    )
    try:
        yield line.close
    finally:
        line.close()


class AnswerStreamer(TextStreamer):
    """Writes an answer to stdout, word by word.

    Attributes:
        said: the text so far.
        tokens: how many they are so far.
        first: when the first token came, by `time.perf_counter`.

    Args:
        processor: the model's.
        begin: called once the first token is there: until then something may be refused, and its
            error shall be the one line on stderr.
        show: False keeps the text to itself.
    """

    def __init__(self, processor, begin: Callable[[], None] = lambda: None, show: bool = True):
        super().__init__(tokenizer_of(processor), skip_prompt=True, skip_special_tokens=True)
        self._begin, self._show = begin, show
        self.said, self.tokens, self.first = "", 0, 0.0

    def put(self, value: torch.Tensor) -> None:
        """Called by generate: with the prompt, then with each token."""
        if not self.next_tokens_are_prompt:
            self.tokens += 1
            if self.tokens == 1:
                self.first = time.perf_counter()
                self._begin()
        super().put(value)

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by TextStreamer with what can be shown."""
        self.said += text
        if self._show:
            super().on_finalized_text(text, stream_end)
