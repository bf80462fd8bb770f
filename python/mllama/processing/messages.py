"""Conversations as chat templates take them: checked copies of messages, their contents in the form
that a template reads.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

Render = Callable[[list[dict]], str]  # messages -> what the template writes

ASSISTANT = "assistant"  # the role of messages that the model says
IMAGE_KEYS = ("image", "path", "url", "base64")  # of a part that brings its image
_CLOSED = re.compile(r"</\w+>\s*(?=\S)")  # behind thoughts, which templates cut off
_TOOL_ROLES = ("tool", "ipython")  # whose content may be a JSON object


def as_messages(messages: Sequence[Mapping], where: str = "messages") -> list[dict]:
    """Return copies of messages with an assistant's missing content as an empty text, and parts of
    type image_url as image.

    Args:
        messages: {"role": ..., "content": ...}, content a str or a list of parts of type text,
            image or image_url; of an assistant that only calls tools also None, of a tool also a
            dict. Other keys stay as they are.
        where: the argument's name, for errors.

    Raises:
        TypeError: messages that are no list, a message, content or text of another type.
        ValueError: no messages, a message without a role, a part of another type, an image_url
            without its address.
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
    ):  # pydantic's, as clients of chat services have
        message = message.model_dump()
    if not isinstance(message, Mapping):
        raise TypeError(f"{where} must be a dict, got {type(message).__name__}")
    role, content = message.get("role"), message.get("content")
    if not isinstance(role, str) or not role:
        raise ValueError(
            f"the role of {where} must be a name such as user or assistant, got {role!r}"
        )
    kept = {key: value for key, value in message.items() if value is not None}
    if content is None and role == ASSISTANT:
        return kept | {"content": ""}
    if isinstance(content, str) or (role in _TOOL_ROLES and isinstance(content, Mapping)):
        return kept
    if not isinstance(content, (list, tuple)) or not all(
        isinstance(part, Mapping) for part in content
    ):
        raise TypeError(
            f"the content of {where} must be a str or a list of dicts, got {type(content).__name__}"
        )
    return kept | {"content": [_as_part(part, where) for part in content]}


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
        raise ValueError(
            f"an image_url part of {where} must hold image_url, a text or {{'url': ...}}"
        )
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
    """Return messages whose contents have the form that the template reads: a text or a list of
    parts.

    Some templates read one of the two alone, and write nothing of the other, or its Python form.
    What a template reads as it was given stays; a content with images always does.

    Args:
        messages: as `as_messages` returns them.
        render: may raise anything.
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
                    mark_texts(message, f"{mark}{number}{mark}")
                    for number, message in enumerate(form)
                ]
            )
        # it does not read this form; what is wrong with all of them the caller's own call will say
        except Exception:
            continue
        shown = {number for number in left if f"{mark}{number}{mark}" in written}
        for number in shown:
            fitted[number] = form[number]
        left -= shown
    return fitted


def unused_mark(text: str) -> str:
    """A character that is not in a text, and that templates do not know."""
    return next(mark for mark in map(chr, range(0xE200, 0xF8FF)) if mark not in text)


def mark_texts(message: dict, mark: str, before: str = "") -> dict:
    """A message with a mark behind, and if asked one before, each of its content's texts, within
    the white space around it.

    What is asked for before is also put behind closing tags such as `</think>`: some templates
    leave out what is before them.
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
