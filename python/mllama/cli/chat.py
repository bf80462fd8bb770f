"""`mllama chat [PICTURE ...]`."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from PIL import Image

from mllama.api import (
    MAX_NEW_TOKENS,
    check_images,
    check_room,
    check_system,
    encode,
    room_left,
    say_loaded,
    tokenizer_of,
)
from mllama.checkpoints.files import write_file, write_json
from mllama.cli import complain
from mllama.cli._answering import facts, load_model, read_images, reply

_PICTURE = (
    "pixel_values",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
)  # arguments of get_image_features
_HELP = """\
/image PATH   a new conversation about this image
/system TEXT  a system prompt from the next question on; without TEXT none
/reset        forget what was said
/save FILE    write the conversation as JSON
/help         this list
/exit         end, as does the end of input or Ctrl-C at the prompt; during an answer Ctrl-C stops the answer"""


def run(arguments: argparse.Namespace) -> None:
    """Answer questions from stdin, each in the light of those before; the oldest are forgotten when
    the model's context is full.

    Without a chat template (PaliGemma) every question stands alone. A question that cannot be put,
    and a command that fails, is told of on stderr, and the next line is read.
    """
    if sys.stdin is None:
        raise OSError("stdin is closed: there are no questions to read")
    if "-" in arguments.words:
        raise ValueError("questions come from stdin: an image cannot, got '-'")
    pictures = read_images(arguments, arguments.words)
    talk = _Talk(arguments, *load_model(arguments))
    if pictures:
        talk.show(arguments.words, pictures)
    if arguments.system is not None:
        talk.instruct(arguments.system)
    say_loaded(arguments.model, talk.model)
    for line in _lines():
        try:
            if line.startswith("/"):
                if not talk.command(*(*line.split(maxsplit=1), "")[:2]):
                    return
            else:
                talk.answer(line)
        except (ValueError, OSError) as error:
            if isinstance(error, BrokenPipeError):
                raise
            complain(error)


class _Talk:
    """A conversation: its images, system prompt and turns, those that still fit the context and all
    that were.
    """

    def __init__(self, arguments: argparse.Namespace, model, processor, options: dict):
        self.arguments, self.model, self.processor, self.options = (
            arguments,
            model,
            processor,
            options,
        )
        self.names: list[str] = []
        self.pictures: list[Image.Image] = []
        self.features = None
        self.system: str | None = None
        self.turns: list[tuple[str, str]] = []
        self.said: list[tuple[str, str]] = []
        self.saved: set[Path] = set()

    def command(self, name: str, rest: str) -> bool:
        """Do what a line says that begins with "/"; False ends the chat.

        Raises:
            ValueError, OSError: no such command, or it cannot be done.
        """
        rest = rest.strip()
        takes = {
            "/image": True,
            "/save": True,
            "/system": None,
            "/reset": False,
            "/help": False,
            "/exit": False,
        }
        if name not in takes:
            raise ValueError(f"there is no command {name[:40]}: /help lists them")
        if takes[name] is not None and takes[name] != bool(rest):
            raise ValueError(
                f"{name} takes {'a ' + ('FILE' if name == '/save' else 'PATH') if takes[name] else 'nothing after it'}"
            )
        if name == "/image":
            path = rest[1:-1] if rest[0] == rest[-1] and rest[0] in "'\"" else rest
            if path == "-":
                raise ValueError("/image takes a PATH: stdin is where questions come from")
            self.show([path], read_images(self.arguments, [path]))
            _note(f"a new conversation about {path}")
        elif name == "/system":
            self.instruct(rest or None)
            _note("a new system prompt" if rest else "no system prompt")
        elif name == "/reset":
            self.turns, self.said = [], []
            _note("a new conversation")
        elif name == "/save":
            self.save(Path(rest))
            _note(f"saved as {rest}")
        elif name == "/help":
            print(_HELP, file=sys.stderr)
        return name != "/exit"

    def show(self, names: list[str], pictures: list[Image.Image]) -> None:
        """Talk about other images, from the beginning.

        Raises:
            ValueError: the model takes none.
        """
        if tokenizer_of(self.processor) is self.processor:
            raise ValueError(f"this model takes no images, got {len(pictures)}")
        self.names, self.pictures, self.features, self.turns, self.said = (
            names,
            pictures,
            None,
            [],
            [],
        )

    def instruct(self, system: str | None) -> None:
        """Take another system prompt.

        Raises:
            ValueError: it would not reach the model.
        """
        if system is not None:
            check_system(self.processor, system)
        self.system = system

    def save(self, path: Path) -> None:
        """Write the conversation.

        Raises:
            OSError: the file is there already, and not from here; or it cannot be written.
        """
        if path.exists() and path.resolve() not in self.saved:
            raise FileExistsError(f"{path} exists")
        said = [text for turn in self.said for text in turn]
        messages = [{"role": "system", "content": self.system}] * (self.system is not None)
        messages += [
            {"role": "assistant" if index % 2 else "user", "content": text}
            for index, text in enumerate(said)
        ]
        content = {
            "model": self.arguments.model or "embedded",
            "images": self.names,
            "messages": messages,
        }
        write_file(path, lambda aside: write_json(aside, content))
        self.saved.add(path.resolve())

    def answer(self, question: str) -> None:
        """`_answer`; Ctrl-C before there is any stops it, too, and costs no conversation.

        Raises:
            ValueError: the question cannot be put.
        """
        try:
            self._answer(question)
        except KeyboardInterrupt:
            _note("stopped")

    def _answer(self, question: str) -> None:
        """Answer, and remember it.

        Raises:
            ValueError: the question cannot be put.
        """
        check_images(self.model, self.pictures)
        inputs, kept = self._fit(question)
        if self.pictures:  # they are encoded once
            if self.features is None:
                with torch.inference_mode():
                    pixels = {
                        name: inputs[name].to(self.model.device)
                        for name in _PICTURE
                        if name in inputs
                    }
                    self.features = self.model.get_image_features(**pixels)
            del inputs["pixel_values"]
            inputs["image_features"] = self.features
        said = reply(
            self.model,
            self.processor,
            inputs,
            self.options,
            show=not self.arguments.json,
            stoppable=True,
        )
        if self.arguments.json:
            shown = {"question": question} | facts(self.arguments, self.model, said)
            print(json.dumps(shown | {"stopped": said.stopped}), flush=True)
        if said.text or not said.stopped:
            self.turns = [*kept, (question, said.text)] if self.processor.chat_template else []
            self.said.append((question, said.text))

    def _fit(self, question: str) -> tuple[Mapping, list]:
        """The inputs and the newest turns that leave room for an answer. `turns` stays: a refused
        question costs no conversation.
        """
        turns = self.turns
        inputs = encode(self.processor, self.pictures, question, turns, self.system)
        while turns and room_left(self.model, inputs) < MAX_NEW_TOKENS:
            turns = turns[1:]
            inputs = encode(self.processor, self.pictures, question, turns, self.system)
        check_room(self.model, inputs)
        return inputs, turns


def _note(text: str) -> None:
    print(f"mllama: {text}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """Lines of stdin that say something; with a prompt where somebody types them."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(
            errors="surrogateescape"
        )  # a line that is no text is refused as a question, not as the end of reading
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line
