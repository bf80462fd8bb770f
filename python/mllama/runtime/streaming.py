"""Text of streamed tokens: complete characters only, and nothing from a stop string on."""

from collections.abc import Sequence
from typing import Any

# What a tokenizer writes for bytes that are not yet a character.
_INCOMPLETE = "\ufffd"


class TextStream:
    """Decodes one row's tokens incrementally.

    Args:
        tokenizer: has `decode(ids, skip_special_tokens)`.
        stop: strings that end the text.

    Attributes:
        text: the text returned so far.
        stopped: whether a stop string was found.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()):
        self.text, self.stopped = "", False
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._ids: list[int] = []
        # Ids before `_start` are final. Those from there to `_end` are already written, but decoded
        # again with the next token, which may change how they are written.
        self._start = self._end = 0
        self._pending = ""  # a possible beginning of a stop string

    def put(self, token: int) -> str:
        """Add a token; return the text that is now certain, which may be empty."""
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
        """Return the remaining text after the last token."""
        if self.stopped:
            return ""
        before = self._decode(self._start, self._end)
        rest = self._decode(self._start, len(self._ids))[len(before) :]
        self._start = self._end = len(self._ids)
        return self._write(rest, True)

    def _decode(self, start: int, end: int) -> str:
        return self._tokenizer.decode(self._ids[start:end], skip_special_tokens=True)

    def _write(self, new: str, last: bool) -> str:
        text, self._pending = self._pending + new, ""
        places = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if places:
            text, self.stopped = text[: min(places)], True
        elif not last:
            pending = max((_overlap(text, stop) for stop in self._stop), default=0)
            text, self._pending = text[: len(text) - pending], text[len(text) - pending :]
        self.text += text
        return text


def _overlap(text: str, stop: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `stop`."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
