"""Prepares conversations for chat templates: checked copies of messages, with contents in the form
that a template reads.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Render = Callable[[list[dict]], str]  # messages -> the template's output

ASSISTANT = "assistant"  # the role of the model's messages
IMAGE_KEYS = ("image", "path", "url", "base64")  # keys of a part that contains its image
REASONING = ("reasoning_content", "thinking", "reasoning")  # keys of a message's reasoning
_CLOSED = re.compile(r"</\w+>\s*(?=\S)")  # the end of reasoning, which templates cut off
_TOOL_ROLES = ("tool", "ipython")  # their content may be a JSON object


def as_messages(messages: Sequence[Mapping], where: str = "messages") -> list[dict]:
    """Check and copy messages. An assistant's missing content becomes "", image_url parts become
    image parts.

    Args:
        messages: {"role": ..., "content": ...}. content is a str or a list of text, image or
            image_url parts; None for an assistant that only calls tools; for a tool also a dict.
            Other keys are copied.
        where: the argument's name, used in errors.

    Raises:
        TypeError: messages is not a list, or a message, content or text has the wrong type.
        ValueError: there are no messages, a message has no role, a part has an unknown type, or an
            image_url has no URL.
    """
    messages = getattr(messages, "messages", messages)
    if not isinstance(messages, (list, tuple)):
        raise TypeError(f"{where} must be a list of messages, got {type(messages).__name__}")
    if not messages:
        raise ValueError(f"{where} is empty: give at least one message")
    return [_as_message(message, f"message {number}") for number, message in enumerate(messages)]


def _as_message(message: Any, where: str) -> dict:
    if dataclasses.is_dataclass(message) and not isinstance(message, type):
        message = {
            field.name: getattr(message, field.name) for field in dataclasses.fields(message)
        }
    elif callable(
        getattr(message, "model_dump", None)
    ):  # pydantic models, which clients of chat services use
        message = message.model_dump()
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a dict, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(
            f"the role of {where} must be a name such as user or assistant, got {role!r}"
        )
    fields = {key: value for key, value in message.items() if value is not None}
    if content is None and role == ASSISTANT:
        return fields | {"content": ""}
    if isinstance(content, str) or (role in _TOOL_ROLES and isinstance(content, Mapping)):
        return fields
    if not isinstance(content, (list, tuple)) or not all(
        isinstance(part, Mapping) for part in content
    ):
        raise TypeError(
            f"the content of {where} must be a str or a list of dicts, got {type(content).__name__}"
        )
    return fields | {"content": [_as_part(part, where) for part in content]}


def _as_part(part: Mapping, where: str) -> dict:
    kind = part.get("type")
    if kind not in ("text", "image", "image_url"):
        raise ValueError(
            f"the type of a part of {where} must be text, image or image_url, got {kind!r}"
        )
    if kind == "text" and not isinstance(part.get("text"), str):
        raise TypeError(
            f"a text part of {where} must hold a str as text, got {type(part.get('text')).__name__}"
        )
    if kind != "image_url":
        return dict(part)
    address = part.get("image_url")
    address = address.get("url") if isinstance(address, Mapping) else address
    if address is None:
        raise ValueError(f"an image_url part of {where} needs image_url, a str or {{'url': ...}}")
    return {"type": "image", "url": address}


def as_parts(content: str | list[dict]) -> list[dict]:
    """A content as parts."""
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def as_text(content: str | list[dict], image_token: str | None = None) -> str:
    """A content as one text, with a placeholder for each image."""
    return "".join(
        part["text"] if part["type"] == "text" else image_token or "" for part in as_parts(content)
    )


def fit_contents(messages: list[dict], render: Render) -> list[dict]:
    """Convert contents to the form that the template reads: a text or a list of parts.

    Some templates read only one of the two; the other is dropped, or written as its Python repr or
    as JSON, both of which escape the quote in a mark. A content that the template reads as given is
    unchanged, as is a content with images.

    Args:
        messages: as returned by `as_messages`.
        render: renders messages; may raise anything.
    """
    mark = unused_mark(
        "".join(as_text(message["content"]) for message in messages if _is_text(message))
    )
    forms = [
        messages,
        [_with_content(message, as_text) for message in messages],
        [_with_content(message, as_parts) for message in messages],
    ]
    left = {number for number, message in enumerate(messages) if _is_text(message)}
    fitted = list(messages)
    for form in forms:
        if not left:
            break
        try:
            written = render(
                [
                    mark_texts(message, f'{mark}"{number}{mark}')
                    for number, message in enumerate(form)
                ]
            )
        # It does not read this form. If both fail, the caller's own call raises the error.
        except Exception:
            continue
        shown = {number for number in left if f'{mark}"{number}{mark}' in written}
        for number in shown:
            fitted[number] = form[number]
        left -= shown
    return fitted


def unused_mark(text: str) -> str:
    """A character that is not in a text and has no meaning in templates."""
    return next(mark for mark in map(chr, range(0xE200, 0xF8FF)) if mark not in text)


def mark_texts(message: dict, mark: str, before: str = "") -> dict:
    """A message with a mark after each of its texts, and optionally one before, inside the
    surrounding white space.

    The mark before is also put after closing tags such as `</think>`, because some templates drop
    what precedes them.
    """

    def marked(text: str) -> str:
        core = text.strip()
        lead = text[: len(text) - len(text.lstrip())]
        inner = _CLOSED.sub(lambda match: match[0] + before, core)
        return f"{lead}{before}{inner}{mark}{text[len(lead) + len(core) :]}"

    content = message["content"]
    if isinstance(content, str):
        return message | {"content": marked(content)}
    if not isinstance(content, list):
        return message
    return message | {
        "content": [
            part | {"text": marked(part["text"])} if part["type"] == "text" else part
            for part in content
        ]
    }


def _is_text(message: dict) -> bool:
    content = message["content"]
    return isinstance(content, str) or (
        isinstance(content, list) and all(part["type"] == "text" for part in content)
    )


def _with_content(message: dict, form: Callable) -> dict:
    return message | {"content": form(message["content"])} if _is_text(message) else message
