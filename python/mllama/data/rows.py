"""Rows of training data as conversations: LLaVA's form, OpenAI's, and question with answer.

`read_row` checks a row and makes it canonical, so that nothing after it has to know the form.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mllama.data.images import ImageFinder
from mllama.processing.image_source import shorten
from mllama.processing.messages import ASSISTANT, IMAGE_KEYS, as_text

PLACEHOLDER = "<image>"  # in the texts of LLaVA's form, and of questions
READ = ("messages", "conversations", "question", "answer", "answers", "image", "images")
_ROLES = {
    "conversations": {"human": "user", "gpt": ASSISTANT}
    | {role: role for role in ("system", "user", ASSISTANT)},
    "messages": {role: role for role in ("system", "user", ASSISTANT)} | {"developer": "system"},
}
_NAMES = {"conversations": ("from", "value"), "messages": ("role", "content")}
_EMPTY = ("", [], {})  # nothing to honor; a `weight` of 0 is something
# Fields that would change what is trained.
_UNSUPPORTED = ("tools", "functions", "system", "video", "videos", "audio", "audios", "rejected")
COLUMNS = READ + _UNSUPPORTED  # that a table's rows are made of


@dataclass(frozen=True)
class Example:
    """A conversation to train on.

    Attributes:
        messages: {"role": "user" | "assistant" | "system", "content": parts}, a part being
            {"type": "text", "text": str} or {"type": "image", "image": a path (str), bytes or a
            PIL image}. At most one system message comes first; then user and assistant take turns,
            and the assistant's answer is last. Only users show images.
        where: the file (or data set) and the row, for errors; rows count from 1.
        answers: all answers to the last question that count as right.
    """

    messages: list[dict]
    where: str
    answers: tuple[str, ...] = ()

    @property
    def images(self) -> list[Any]:
        """The images of all messages, in order, as the parts have them."""
        return [
            part["image"]
            for message in self.messages
            for part in message["content"]
            if part["type"] == "image"
        ]


def read_row(row: Any, where: str, images: ImageFinder, question: str | None = None) -> Example:
    """Make a row canonical.

    Args:
        row: a dict with `messages`, `conversations`, or `question` and `answer` (or `answers`, of
            which the most frequent one is trained); its images in `image` or `images`, or in the
            parts of its messages.
        where: names the row in errors.
        images: finds images.
        question: the question of rows that have an answer alone.

    Raises:
        ValueError: the row is invalid; the message begins with `where`.
    """
    try:
        row = _present(row, "the row")
        form = _form_of(row)
        own = [images.find(image) for image in _list_of_images(row)]
        if question is not None and (form != "answer" or "question" in row):
            raise ValueError("question is given for all rows, but the row has its own")
        if form == "answer":
            messages, answers = _from_answer(row, own, question)
        else:
            messages, answers = _from_turns(row[form], form, own, images), ()
        _check_turns(messages)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return Example(messages, where, answers or (as_text(messages[-1]["content"]),))


def _present(fields: Any, what: str) -> dict[str, Any]:
    """The fields that have a value."""
    if not isinstance(fields, Mapping):
        raise ValueError(f"{what} must be an object with names, got {_kind(fields)}")
    return {name: value for name, value in fields.items() if value is not None}


def _kind(value: Any) -> str:
    """A value for errors: texts as they are, others by their type."""
    if isinstance(value, str):
        return repr(shorten(value, 40))
    return "nothing" if value is None else type(value).__name__


def _form_of(row: Mapping[str, Any]) -> str:
    for name in _UNSUPPORTED:
        if row.get(name):
            raise ValueError(f"{name} is not supported: remove it from the row")
    found = [name for name in ("messages", "conversations") if name in row]
    if "answer" in row or "answers" in row:
        found.append("answer")
    if len(found) == 1:
        return found[0]
    names = ", ".join(shorten(str(name), 20) for name in list(row)[:10]) or "none"
    if not found:
        raise ValueError(
            "the row needs messages, conversations, or question and answer (is the answer "
            f"missing?); its fields: {names}"
        )
    raise ValueError(f"the row must have one of {' and '.join(found)}, not several")


def _list_of_images(row: Mapping[str, Any]) -> list:
    if "image" in row and "images" in row:
        raise ValueError("the row must have image or images, not both")
    images = row.get("images", row.get("image"))
    if images is None or images == "":
        return []
    return list(images) if isinstance(images, (list, tuple)) else [images]


def _from_answer(
    row: Mapping[str, Any], images: list, question: str | None
) -> tuple[list[dict], tuple[str, ...]]:
    asked = row.get("question", question)
    if asked is None:
        raise ValueError("the row has no question, and none is given for all rows")
    answers = row.get("answers", [])
    if not isinstance(answers, (list, tuple)):
        raise ValueError(f"answers must be a list of texts, got {_kind(answers)}")
    right = [_text(one, "an answer") for one in answers]
    answer = row.get("answer")
    if answer is None and right:
        answer = Counter(right).most_common(1)[0][0]
    answer = _text(answer, "answer")
    asked = _text(asked, "question")
    parts = _placed(asked, images)
    if images and not any(part["type"] == "image" for part in parts):
        parts = [{"type": "image"} for _ in images] + parts
    messages = [
        {"role": "user", "content": parts},
        {"role": ASSISTANT, "content": _text_parts(answer)},
    ]
    _fill(messages, images)
    return messages, tuple(right)


def _from_turns(turns: Any, form: str, own: list, images: ImageFinder) -> list[dict]:
    """Messages in LLaVA's or OpenAI's form."""
    if not isinstance(turns, (list, tuple)):
        raise ValueError(f"{form} must be a list of messages, got {_kind(turns)}")
    if not turns:
        raise ValueError(f"{form} is empty")
    messages = [
        _from_turn(_present(turn, f"message {number}"), number, form, own, images)
        for number, turn in enumerate(turns, 1)
    ]
    _fill(messages, own)
    return messages


def _from_turn(
    turn: dict[str, Any], number: int, form: str, own: list, images: ImageFinder
) -> dict:
    role_name, content_name = _NAMES[form]
    role, content = turn.get(role_name), turn.get(content_name)
    if unknown := [name for name in turn if name not in _NAMES[form] and turn[name] not in _EMPTY]:
        raise ValueError(
            f"message {number} has {shorten(str(unknown[0]), 40)}, which is not supported"
        )
    known = _ROLES[form]
    if not isinstance(role, str) or role not in known:
        raise ValueError(
            f"{role_name} of message {number} must be {', '.join(known)}, got {_kind(role)}"
        )
    if isinstance(content, (list, tuple)) and form == "messages":
        parts = [part for item in content for part in _from_part(item, f"message {number}", images)]
    else:
        content = _text(content, f"{content_name} of message {number}")
        # OpenAI's texts are texts: <image> in them has a meaning only if the row has images.
        parts = _placed(content, own) if own or form == "conversations" else _text_parts(content)
    return {"role": known[role], "content": parts}


def _from_part(part: Any, where: str, images: ImageFinder) -> Iterator[dict]:
    part = _present(part, f"a part of {where}")
    kind = part.pop("type", None)
    part.pop("index", None)  # of `images`, whose order it repeats
    if kind == "text" and part.keys() == {"text"}:
        yield from _text_parts(_text(part["text"], f"a text of {where}"))
    elif kind == "image" and not part:
        yield {"type": "image"}
    elif kind == "image" and len(part) == 1 and (name := next(iter(part))) in IMAGE_KEYS:
        yield {"type": "image", "image": images.find(part[name], encoded=name == "base64")}
    elif kind == "image_url" and part.keys() == {"image_url"}:
        yield {"type": "image", "image": images.find(_address(part["image_url"], where))}
    elif kind in ("text", "image", "image_url"):
        names = ", ".join(shorten(str(name), 20) for name in part) or "nothing"
        raise ValueError(f"a part of {where} has the type {kind}, but beside it {names}")
    else:
        raise ValueError(
            f"the type of a part of {where} must be text, image or image_url, got {_kind(kind)}"
        )


def _address(value: Any, where: str) -> Any:
    if not isinstance(value, Mapping):
        return value
    address = _present(value, f"image_url of {where}")
    if address.pop("detail", "auto") != "auto":
        raise ValueError(f"detail of an image of {where} is not supported, only auto")
    if address.keys() != {"url"}:
        raise ValueError(f"image_url of {where} must have url alone")
    return address["url"]


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} must be a text, got {_kind(value)}")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{what} is not valid UTF-8") from None
    return value


def _text_parts(text: str) -> list[dict]:
    return [{"type": "text", "text": text}] if text else []


def _placed(text: str, images: Sequence) -> list[dict]:
    """A text with placeholders as parts. A line break next to a placeholder belongs to it."""
    if not images and PLACEHOLDER in text:
        raise ValueError(f"a text has {PLACEHOLDER}, but the row has no image")
    parts: list[dict] = []
    pieces = text.split(PLACEHOLDER)
    for number, piece in enumerate(pieces):
        if number:
            parts.append({"type": "image"})
            piece = piece.removeprefix("\n")
        if number < len(pieces) - 1:
            piece = piece.removesuffix("\n")
        parts += _text_parts(piece)
    return parts


def _fill(messages: list[dict], images: list) -> None:
    """Put the row's images, in order, into the image parts that have none."""
    parts = [part for message in messages for part in message["content"]]
    empty = [part for part in parts if part["type"] == "image" and "image" not in part]
    if len(empty) != len(images):
        raise ValueError(
            f"the row has {len(images)} image(s), and its texts have places for {len(empty)}"
        )
    for part, image in zip(empty, images, strict=True):
        part["image"] = image


def _check_turns(messages: list[dict]) -> None:
    """Require a conversation that ends with an answer."""
    rest = messages[1:] if messages[0]["role"] == "system" else messages
    shift = 1 + len(messages) - len(rest)
    for number, message in enumerate(messages, 1):
        has_text = as_text(message["content"]).strip()
        has_image = any(part["type"] == "image" for part in message["content"])
        if has_image and message["role"] != "user":
            raise ValueError(f"message {number}, of the {message['role']}, must not hold an image")
        if not has_text and not has_image:
            raise ValueError(f"message {number}, of the {message['role']}, is empty")
    for index, message in enumerate(rest):
        wanted = ("user", ASSISTANT)[index % 2]
        if message["role"] != wanted:
            raise ValueError(
                f"message {index + shift} must be of the {wanted}, got one of the {message['role']}"
            )
    if not rest or rest[-1]["role"] != ASSISTANT:
        raise ValueError("the last question has no answer")
