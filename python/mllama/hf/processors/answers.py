"""Finds the assistant's tokens of a conversation for any chat template, by rendering it with marked
answers.

If a template has `{% generation %}`, its own marks are used, as in transformers.
"""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from mllama.processing.messages import (
    ASSISTANT,
    REASONING,
    as_messages,
    as_text,
    fit_contents,
    mark_texts,
    unused_mark,
)

Span = tuple[int, int]  # (start, end) in characters
_GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_COMMENT = re.compile(r"\{#.*?#\}", re.DOTALL)
_ENOUGH = 5  # characters at the end of a prompt that do not match by chance


def apply_template(
    call: Callable[..., Any],
    render: Callable[..., str],
    template: Any,
    tokenizer: Any,
    conversation: Sequence,
    options: dict[str, Any],
    with_places: dict[str, Any],
) -> Any:
    """transformers' apply_chat_template, with contents in the form that the template reads, and the
    mask of the assistant's tokens.

    Args:
        call: transformers' method: (conversation, **options).
        render: the same as text, for one conversation: (messages, **option overrides).
        template: the template.
        tokenizer: the tokenizer whose tokens are marked.
        conversation: messages, or a list of conversations.
        options: options of `call`.
        with_places: option overrides that make it return offset_mapping and
            text_replacement_offsets.

    Raises:
        TypeError, ValueError: messages are invalid (`as_messages`), a conversation has no answer,
            or answers cannot be found in the template's output or are not marked by it.
    """
    batched, conversations = as_batch(conversation)
    conversations = [fit_contents(messages, render) for messages in conversations]
    given = conversations if batched else conversations[0]
    if not options.get("return_assistant_tokens_mask"):
        return call(given, **options)
    for name in ("continue_final_message", "sanitize_control_tokens"):
        if options.get(name):
            raise ValueError(f"{name} and return_assistant_tokens_mask cannot be combined")
    for number, messages in enumerate(conversations):
        if not any(message["role"] == ASSISTANT for message in messages):
            roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
            raise ValueError(
                f"conversation {number} has no message with the role {ASSISTANT}, so no token is "
                f"the model's: {roles}"
            )
    if _GENERATION.search(_COMMENT.sub("", str(template))):
        return _all_marked(call(given, **options), options)
    if not options.get("tokenize") or not options.get("return_dict"):
        raise ValueError("return_assistant_tokens_mask needs tokenize=True and return_dict=True")
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            "return_assistant_tokens_mask needs a fast tokenizer, which returns where its tokens "
            "stand in the text"
        )
    names = _special_names(tokenizer)
    spans = [
        find_answers(messages, render, names, number)
        for number, messages in enumerate(conversations)
    ]
    return _with_masks(
        call(given, **{**options, **with_places, "return_assistant_tokens_mask": False}), spans
    )


def as_batch(conversation: Any) -> tuple[bool, list[list[dict]]]:
    """Whether there are several conversations, and checked copies of them."""
    several = isinstance(conversation, (list, tuple)) and len(conversation) > 0
    several = several and (
        isinstance(conversation[0], (list, tuple)) or hasattr(conversation[0], "messages")
    )
    if not several:
        return False, [as_messages(conversation, "conversation")]
    return True, [
        as_messages(messages, f"conversation[{number}]")
        for number, messages in enumerate(conversation)
    ]


def find_answers(
    messages: list[dict], render: Callable[..., str], names: re.Pattern, number: int = 0
) -> list[Span]:
    """Spans of the assistant's text in `render(messages)`: from the end of each answer's prompt to
    its end token, inclusive.

    Args:
        messages: as returned by `as_messages`.
        render: (messages, add_generation_prompt=None) -> text; None is as in the text that is
            tokenized.
        names: matches special tokens' texts, which must not be split.
        number: the conversation's number, used in errors.

    Raises:
        ValueError: the answers cannot be found, or none is written.
    """
    text = render(messages)
    mark = unused_mark(text)
    for before, empty in (
        (True, True),
        (True, False),
        (False, False),
    ):  # a mark can hide the start of an answer, or its absence, from a template
        marked = [
            _mark(message, f"{mark}{place}{mark}", before, empty)
            if message["role"] == ASSISTANT
            else message
            for place, message in enumerate(messages)
        ]
        whole = _try(render, marked)
        if whole is not None and _Marks(mark).without(whole) == text:
            break
    else:
        raise _unknown(number, "it writes different text around marked answers")
    spans = _Spans(render, marked, whole, _Marks(mark), names, number)
    found = [
        span
        for place, message in enumerate(messages)
        if message["role"] == ASSISTANT and (span := spans.of(place)) is not None
    ]
    if not found:
        raise _unknown(number, "it writes none of them")
    return found


class _Marks:
    """The marks in a text."""

    def __init__(self, mark: str):
        self.any = re.compile(rf"{mark}(\d+){mark}")

    def of(self, text: str, place: int) -> list[Span]:
        """Spans of a message's marks. All marks are matched in order: between two of them an answer
        that is a number looks like a mark.
        """
        return [match.span() for match in self.any.finditer(text) if match[1] == str(place)]

    def without(self, text: str) -> str:
        return self.any.sub("", text)


class _Spans:
    """The answers in a text with marks.

    Attributes:
        whole: the text.
    """

    def __init__(
        self,
        render: Callable[..., str],
        marked: list[dict],
        whole: str,
        marks: _Marks,
        names: re.Pattern,
        number: int,
    ):
        self._render, self._marked, self.whole, self._marks, self._names, self._number = (
            render,
            marked,
            whole,
            marks,
            names,
            number,
        )

    def of(self, place: int) -> Span | None:
        """The span of a message's answer in the text without marks; None if the template drops it
        from a longer conversation.
        """
        prompt = _try(self._render, self._marked[:place], add_generation_prompt=True)
        alone = _try(self._render, self._marked[: place + 1], add_generation_prompt=False)
        if alone is None:
            raise _unknown(self._number, f"it fails on the first {place + 1} messages alone")
        here, there = self._marks.of(self.whole, place), self._marks.of(alone, place)
        if here and there:
            start, last, rest = (
                self._start(place, prompt, alone, here[0][0]),
                here[-1][1],
                alone[there[-1][1] :],
            )
        elif there:
            return None
        elif (
            prompt is not None and alone.startswith(prompt) and self.whole.startswith(prompt)
        ):  # nothing to mark in it
            start, last, rest = len(prompt), len(prompt), alone[len(prompt) :]
        else:
            raise _unknown(self._number, f"it does not write message {place}")
        end = last + self._end(self.whole[last:], rest)
        return (
            (
                len(self._marks.without(self.whole[:start])),
                len(self._marks.without(self.whole[:end])),
            )
            if end > start
            else None
        )

    def _start(self, place: int, prompt: str | None, alone: str, first: int) -> int:
        """Start of the model's text: after the prompt for it, which may be longer or shorter than
        an answer's header.
        """
        shared = len(os.path.commonprefix([prompt or "", self.whole]))
        if prompt is not None and (shared == len(prompt) or not self.whole[shared:first].strip()):
            return min(shared, first)
        longer = _try(self._render, self._marked[: place + 1], add_generation_prompt=True)
        if longer is not None and longer.startswith(alone) and (header := longer[len(alone) :]):
            found = self.whole.rfind(header, 0, first)
            if found >= 0 and not self._marks.any.search(self.whole, found, first):
                return found + len(header)
        # For templates that move a text, such as a system message into the last question: match the
        # end of the prompt, and the space before the answer.
        blank = first - len(self.whole[:first].rstrip())
        alike = [
            len(os.path.commonprefix([(prompt or "")[::-1], self.whole[: first - more][::-1]]))
            for more in range(blank + 1)
        ]
        if max(alike) >= _ENOUGH:
            return first - alike.index(max(alike))
        raise _unknown(
            self._number, f"where message {place} begins is not told by the prompt for it"
        )

    def _end(self, text: str, alone: str) -> int:
        """Length of the text after an answer that belongs to the model: what the template writes
        regardless of the next message.
        """
        end = len(os.path.commonprefix([text, alone]).rstrip())
        cut = next(
            (
                match.start()
                for match in self._names.finditer(text)
                if match.start() < end < match.end()
            ),
            end,
        )
        return len(text[:cut].rstrip())


def _mark(message: dict, mark: str, ahead: bool, empty: bool) -> dict:
    """Mark everything the model writes in an assistant's message: after it, `ahead` of it, and if
    it is `empty`.
    """
    before = mark if ahead else ""
    marked = (
        mark_texts(message, mark, before) if empty or as_text(message["content"]) else dict(message)
    )
    for name in REASONING:
        if isinstance(message.get(name), str) and message[name]:
            marked[name] = mark_texts({"content": message[name]}, mark, before)["content"]
    if isinstance(message.get("tool_calls"), (list, tuple)):
        marked["tool_calls"] = [_mark_call(call, mark) for call in message["tool_calls"]]
    return marked


def _mark_call(call: Any, mark: str) -> Any:
    if not isinstance(call, Mapping):
        return call
    if isinstance(call.get("function"), Mapping):
        return {**call, "function": _mark_call(call["function"], mark)}
    return {**call, "name": f"{call['name']}{mark}"} if isinstance(call.get("name"), str) else call


def _try(render: Callable[..., str], messages: list[dict], **changes: bool) -> str | None:
    """The template's output; None if it raises."""
    try:
        return render(messages, **changes)
    except Exception:  # templates fail in many ways
        return None


def _unknown(number: int, reason: str) -> ValueError:
    return ValueError(
        f"the answers of conversation {number} cannot be found: {reason}; put {{% "
        "generation %}} and"
        " {% endgeneration %} around them in the template"
    )


def _special_names(tokenizer: Any) -> re.Pattern:
    names = sorted(tokenizer.get_added_vocab(), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)) or "(?!)")


def _with_masks(batch: Any, spans: list[list[Span]]) -> Any:
    """Add assistant_masks to a batch, in the form of its input_ids, and remove the offsets."""
    offsets, replaced, ids = (
        batch.pop("offset_mapping"),
        batch.pop("text_replacement_offsets", None),
        batch["input_ids"],
    )
    rows, single = _lists(offsets), not isinstance(_lists(ids)[0], list)
    rows = [rows] if single else rows
    masks = [
        _mask(row, _moved(places, replaced[number] if replaced else ()))
        for number, (row, places) in enumerate(zip(rows, spans, strict=True))
    ]
    masks = masks[0] if single else masks
    if isinstance(ids, torch.Tensor):
        masks = torch.tensor(masks, dtype=torch.int64, device=ids.device)
    elif isinstance(ids, np.ndarray):
        masks = np.array(masks, dtype=np.int64)
    batch["assistant_masks"] = masks
    return batch


def _all_marked(batch: Any, options: Mapping[str, Any]) -> Any:
    """A batch with the template's own assistant_masks. Unless truncated, every conversation must
    have marked tokens.

    Raises:
        ValueError: a conversation has none.
    """
    places = (options, options.get("tokenizer_kwargs") or {}, options.get("processor_kwargs") or {})
    rows = _lists(batch["assistant_masks"]) if "assistant_masks" in batch else []
    rows = rows if not rows or isinstance(rows[0], list) else [rows]
    if not any(place.get("truncation") for place in places):
        for number, row in enumerate(rows):
            if not any(row):
                raise ValueError(
                    f"the chat template has {{% generation %}}, but marks no token of conversation "
                    f"{number}"
                )
    return batch


def _lists(values: Any) -> list:
    return values if isinstance(values, list) else values.tolist()


def _moved(spans: list[Span], replaced: Sequence[Mapping]) -> list[Span]:
    """Map spans of the template's text to the processor's text."""

    def moved(character: int) -> int:
        before = [place for place in replaced if place["span"][1] <= character]
        return character + (before[-1]["new_span"][1] - before[-1]["span"][1] if before else 0)

    return [(moved(start), moved(end)) for start, end in spans]


def _mask(offsets: Sequence[Span], spans: list[Span]) -> list[int]:
    """1 for each token that overlaps a span; padding and added tokens have no characters."""
    return [
        int(any(start < last and end > first for first, last in spans)) for start, end in offsets
    ]
