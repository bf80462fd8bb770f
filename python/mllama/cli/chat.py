"""`mllama chat [IMAGE ...]`."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mllama.api import say_loaded
from mllama.checkpoints.files import write_file, write_json
from mllama.cli import complain
from mllama.cli._answering import Loaded, facts, load_session, read_images, reply
from mllama.lora.named import activate_lora
from mllama.processing.preprocessors import Preprocessor
from mllama.runtime.checks import check_room
from mllama.runtime.questions import as_messages, check_images, check_system, encode, tokenizer_of
from mllama.runtime.session import MAX_NEW_TOKENS
from mllama.runtime.transcript import Transcript

if TYPE_CHECKING:
    from PIL import Image

_HELP = """\
/image PATH   start a new conversation about this image
/system TEXT  use this system prompt from the next question on; without TEXT, none
/adapter NAME answer with this one of the adapters that --adapter NAME=PATH named
/reset        forget the conversation
/save FILE    write the conversation as JSON
/help         show this list
/exit         quit, as does Ctrl-C at the prompt; during an answer Ctrl-C stops the answer"""


def run(arguments: argparse.Namespace) -> None:
    """Answer questions from stdin as one conversation. The oldest turns are dropped when the
    model's context is full.

    Without a chat template (PaliGemma) questions are independent. Rejected questions and failed
    commands print an error to stderr; the chat goes on.
    """
    if sys.stdin is None:
        raise OSError("stdin is closed: there are no questions to read")
    if "-" in arguments.words:
        raise ValueError("questions come from stdin: an image cannot, got '-'")
    images = read_images(arguments, arguments.words)
    talk = _Talk(arguments, load_session(arguments))
    if images:
        talk.show(arguments.words, images)
    if arguments.system is not None:
        talk.instruct(arguments.system)
    say_loaded(arguments.model, talk.session.model)
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


class _KeptImages:
    """An image transform that is run once: a chat is about the same images until there are others.

    Args:
        transform: the preprocessor's own.
    """

    def __init__(self, transform: Any):
        self._transform, self._result = transform, None

    def __call__(self, images: list) -> dict:
        self._result = self._result or self._transform(images)
        return dict(self._result)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transform, name)


class _Talk:
    """A conversation: images, system prompt and turns. The session computes only what is new in
    each question.
    """

    def __init__(self, arguments: argparse.Namespace, loaded: Loaded):
        self.arguments, self.loaded, self.session = arguments, loaded, loaded.session
        self.names: list[str] = []
        self.images: list[Image.Image] = []
        self.system: str | None = None
        self.turns: list[tuple[str, str]] = []  # those that still fit the context
        self.transcript = Transcript(loaded.session.tokenizer)  # of the same turns
        self.history: list[tuple[str, str]] = []  # all turns
        self.saved: set[Path] = set()
        self._transform = getattr(loaded.session.processor, "images", None)

    def command(self, name: str, rest: str) -> bool:
        """Run a line that begins with "/"; False ends the chat.

        Raises:
            ValueError, OSError: the command is unknown or fails.
        """
        rest = rest.strip()
        takes = {
            "/adapter": True,
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
            wanted = {"/save": "a FILE", "/image": "a PATH", "/adapter": "a NAME"}.get(
                name, "nothing after it"
            )
            raise ValueError(f"{name} takes {wanted}")
        if name == "/image":
            path = rest[1:-1] if rest[0] == rest[-1] and rest[0] in "'\"" else rest
            if path == "-":
                raise ValueError("/image takes a PATH: stdin is where questions come from")
            self.show([path], read_images(self.arguments, [path]))
            _note(f"a new conversation about {path}")
        elif name == "/adapter":
            activate_lora(self.session.model, rest)
            _note(f"answers come from the adapter {rest}")
        elif name == "/system":
            self.instruct(rest or None)
            _note("a new system prompt" if rest else "no system prompt")
        elif name == "/reset":
            self.forget()
            _note("a new conversation")
        elif name == "/save":
            self.save(Path(rest))
            _note(f"saved as {rest}")
        elif name == "/help":
            print(_HELP, file=sys.stderr)
        return name != "/exit"

    def show(self, names: list[str], images: "list[Image.Image]") -> None:
        """Start a new conversation about other images.

        Raises:
            ValueError: the model takes no images.
        """
        if tokenizer_of(self.session.processor) is self.session.processor:
            raise ValueError(f"this model takes no images, got {len(images)}")
        self.names, self.images = names, images
        self.forget()
        if isinstance(self.session.processor, Preprocessor):
            self.session.processor.images = _KeptImages(self._transform)

    def forget(self) -> None:
        """Start a new conversation."""
        self.turns, self.history = [], []
        self.transcript.reset()

    def instruct(self, system: str | None) -> None:
        """Set the system prompt.

        Raises:
            ValueError: the chat template would drop it.
        """
        if system is not None:
            check_system(self.session.processor, system)
        self.system = system

    def save(self, path: Path) -> None:
        """Write the conversation as JSON.

        Raises:
            OSError: the file exists and was not written by this chat, or cannot be written.
        """
        if path.exists() and path.resolve() not in self.saved:
            raise FileExistsError(f"{path} exists")
        texts = [text for turn in self.history for text in turn]
        messages = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages += as_messages(texts)
        content = {
            "model": self.arguments.model or "embedded",
            "images": self.names,
            "messages": messages,
        }
        write_file(path, lambda aside: write_json(aside, content))
        self.saved.add(path.resolve())

    def answer(self, question: str) -> None:
        """Answer a question; Ctrl-C stops the answer and leaves the conversation as it is.

        Raises:
            ValueError: the question is rejected.
        """
        try:
            self._answer(question)
        except KeyboardInterrupt:
            _note("stopped")

    def _answer(self, question: str) -> None:
        """Answer a question and remember the turn.

        Raises:
            ValueError: the question is rejected.
        """
        check_images(self.session, self.images)
        inputs, fitting = self._fit(question)
        answer = reply(self.arguments, self.loaded, inputs, stoppable=True)
        if self.arguments.json:
            shown = {"question": question} | facts(self.arguments, self.session, answer)
            print(json.dumps(shown | {"stopped": answer.stopped}), flush=True)
        if answer.text or not answer.stopped:
            templated = self.session.processor.chat_template
            self.turns = [*fitting, (question, answer.text)] if templated else []
            self.transcript.answer(answer.completion)
            self.history.append((question, answer.text))

    def _fit(self, question: str) -> tuple[Mapping, list]:
        """The inputs, and the newest turns that leave room for an answer. `turns` is unchanged, so
        that a rejected question loses nothing.

        Dropping turns changes what all others attend to, and they are computed anew. So room is
        made for several further turns at once.
        """
        turns, context, room = self.turns, self.session.context, MAX_NEW_TOKENS
        inputs = self._encode(question, turns)
        while turns and context - inputs["input_ids"].shape[1] < room:
            turns, room = turns[1:], MAX_NEW_TOKENS + context // 4
            inputs = self._encode(question, turns)
        check_room(context, inputs["input_ids"].shape[1])
        return inputs, turns

    def _encode(self, question: str, turns: list[tuple[str, str]]) -> Mapping:
        inputs = encode(self.session.processor, self.images, question, turns, self.system)
        return self.transcript.continue_with(inputs)


def _note(text: str) -> None:
    print(f"mllama: {text}", file=sys.stderr)


def _lines() -> Iterator[str]:
    """Non-empty lines of stdin, with a prompt on a terminal."""
    if hasattr(sys.stdin, "reconfigure"):
        sys.stdin.reconfigure(
            errors="surrogateescape"
        )  # invalid text is rejected as a question, not as the end of the input
    prompt = "> " if sys.stdin.isatty() and sys.stdout.isatty() else ""
    while True:
        try:
            line = input(prompt).strip()
        except EOFError:
            return
        if line:
            yield line
