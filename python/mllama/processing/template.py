"""Renders chat templates. They come with models from anyone, so they run in jinja2's immutable
sandbox with limits, and with transformers' names.
"""

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.lexer import Token
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from mllama.processing.messages import REASONING

MAX_STEPS = 200_000  # a released template takes dozens per message
MAX_CHARACTERS = 2**24
_MAX_NUMBER = 100_000  # jinja2's own limit of range()

_steps_left: ContextVar[list[int]] = ContextVar("steps_left")


def render(
    template: str | Mapping[str, str], variables: Mapping[str, str], messages: Sequence[Mapping]
) -> str:
    """Render a chat template for messages, up to the model's turn.

    The sandbox blocks access to the interpreter and limits range() to 100 000. In addition `**`
    and larger numbers are rejected, because one step could use gigabytes; loops and macro calls
    are limited to MAX_STEPS, the result to MAX_CHARACTERS. Intermediate values are not limited: a
    template that doubles a text step by step can still exhaust the memory.

    Args:
        template: a Jinja template, or several by name, of which "default" is used.
        variables: the tokenizer's special tokens by name (bos_token ...).
        messages: {"role": ..., "content": ...}, as returned by
            `mllama.processing.messages.as_messages`.

    Raises:
        ValueError: the template fails or exceeds a limit.
    """
    try:
        text = template if isinstance(template, str) else template["default"]
        budget = _steps_left.set([MAX_STEPS])
        try:
            prompt = compile_template(text).render(
                messages=[_with_reasoning(_plain(message)) for message in messages],
                tools=None,
                documents=None,
                add_generation_prompt=True,
                **variables,
            )
        finally:
            _steps_left.reset(budget)
        if len(prompt) > MAX_CHARACTERS:
            raise ValueError(f"it wrote {len(prompt)} characters, more than {MAX_CHARACTERS}")
    # Templates fail in many ways: TemplateError, TypeError, OverflowError, RecursionError ...
    except Exception as error:
        raise ValueError(f"the chat template fails: {error}") from error
    return prompt


@functools.lru_cache(maxsize=32)
def compile_template(text: str):
    """Compile a template.

    Raises:
        TemplateError: its syntax is invalid.
        ValueError: it contains `**` or a number above 100 000.
    """
    _check_numbers(text)
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Chat, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals.update(
        raise_exception=_raise_exception,
        strftime_now=_strftime_now,
        dict=_Dict(),
        namespace=_Namespace,
    )
    return environment.from_string(text)


def _check_numbers(text: str) -> None:
    for _, kind, value in Environment().lex(text):
        if (kind, value) == ("operator", "**") or (
            kind == "integer" and int(value.replace("_", ""), 0) > _MAX_NUMBER
        ):
            raise ValueError(f"{value} is not accepted in a template: the limit is {_MAX_NUMBER}")


class _Chat(Extension):
    """`{% generation %}`, which marks the model's answers, and a count of the steps.

    A tag is inserted at the start of each loop and macro. Templates cannot shadow it with a
    variable of the same name.
    """

    tags = {"generation", "mllama_step"}

    def filter_stream(self, stream) -> Iterator[Token]:
        head = None
        for token in stream:
            yield token
            if token.type == "block_begin":
                head = stream.current.value if stream.current.type == "name" else None
            elif token.type == "block_end" and head in ("for", "macro"):
                yield Token(token.lineno, "block_begin", "{%")
                yield Token(token.lineno, "name", "mllama_step")
                yield Token(token.lineno, "block_end", "%}")

    def parse(self, parser) -> nodes.Node:
        tag = next(parser.stream)
        if tag.value == "mllama_step":
            return nodes.ExprStmt(self.call_method("_step"), lineno=tag.lineno)
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_said"), [], [], body, lineno=tag.lineno)

    def _step(self) -> None:
        left = _steps_left.get()
        left[0] -= 1
        if left[0] < 0:
            raise TimeoutError(f"it takes more than {MAX_STEPS} steps")

    def _said(self, caller) -> str:
        return caller()


class _Dict:
    """`dict` without access to its class."""

    def __call__(self, *args, **kwargs) -> dict:
        return dict(*args, **kwargs)

    def fromkeys(self, *args) -> dict:
        return dict.fromkeys(*args)


class _Namespace(Namespace):
    """`namespace` that rejects names with a leading underscore."""

    def __init__(*args, **kwargs):
        self, args = args[0], args[1:]
        attributes = dict(*args, **kwargs)
        for name in attributes:
            _check_name(name)
        Namespace.__init__(self, attributes)

    def __setitem__(self, name, value):
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace takes no names with a leading underscore, got {name!r}")


def _to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message) -> None:
    raise TemplateError(message)


def _strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def _plain(value: Any) -> Any:
    """A message's value rebuilt from JSON types: templates see no methods of other objects."""
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(map(_plain, value)) if type(value) in (list, tuple) else list(value)
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return value if type(value) is kind else getattr(kind, f"__{kind.__name__}__")(value)
    return None if value is None else f"<{type(value).__name__}>"


def _with_reasoning(message: dict) -> dict:
    """A message's reasoning under each key that templates read."""
    reasoning = next((message[key] for key in REASONING if message.get(key) is not None), None)
    if reasoning is None:
        return message
    return {"thinking": reasoning, **message, "reasoning_content": reasoning}
