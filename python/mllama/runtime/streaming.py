"""Text of tokens as they come: whole characters, and nothing from a stop string on."""

from collections.abc import Sequence
from typing import Any

# What a decoder writes for bytes that are no character yet.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes the tokens of one row piece by piece.

    Args:
        tokenizer: has `decode(ids, skip_special_tokens)`.
        stop: strings before which the text ends.

    Attributes:
        text: what was returned so far.
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # Ids before `_start` are decoded no more. Those from there to `_end` are written already,
        # and decoded again with the next, since a token may be written otherwise at a beginning.
        self._start = self._end = 0
        self._held = ""  # may be the beginning of a stop string

    def put(self, token: int) -> str:
        """Take the next token; return the text it makes certain, often none."""
        if self.stopped:
            return ""
        self._ids.append(token)
        before = self._decode(self._start, self._end)
        after = self._decode(self._start, len(self._ids))
        if len(after) <= len(before) or after.endswith(_INCOMPLETE):
            return ""
        self._start, self._end = self._end, len(self._ids)
        return self._write(after[len(before) :], False)

    def end(self) -> str:
        """Return what is left once no more tokens come."""
        if self.stopped:
            return ""
        before = self._decode(self._start, self._end)
        rest = self._decode(self._start, len(self._ids))[len(before) :]
        self._start = self._end = len(self._ids)
        return self._write(rest, True)

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _write(self, new: str, last: bool) -> str:
        text, self._held = self._held + new, ""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            text, self.stopped = text[: min(places)], True
        elif not last:
            held = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._held = text[: len(text) - held], text[len(text) - held :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that `stop` begins with."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
