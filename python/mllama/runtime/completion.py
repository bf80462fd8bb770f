"""What is generated for one row of a batch."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from mllama.runtime.streaming import TextStream


@dataclass
class Completion:
    """What was generated for one row.

    Attributes:
        token_ids: the end token included.
        text: without special tokens, and without the stop string and what follows it; None of a
            session without a processor.
        finish_reason: "eos", "stop" (a stop string), "length" (max_new_tokens, or the context), or
            "interrupted".
    """

    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: str = ""


@dataclass
class Generation:
    """What one call generated.

    Attributes:
        completions: one per row.
        num_prompt_tokens: ids of a row's prompt, padding included.
        num_reused_tokens: of these, ids that the cache had.
        prefill_seconds: until the first tokens were there.
        decode_seconds: for all others.
    """

    completions: list[Completion]
    num_prompt_tokens: int
    num_reused_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0


class Row:
    """One row while it is generated.

    Args:
        index: its place in the batch.
        tokenizer: for its text; None makes none.
        stop: strings that end it.
        on_text: told of each token's text.
    """

    def __init__(
        self,
        index: int,
        tokenizer: Any = None,
        stop: Sequence[str] = (),
        on_text: Callable[[int, str], None] | None = None,
    ):
        self.completion = Completion()
        self._index, self._tokenizer, self._on_text = index, tokenizer, on_text
        self._stream = None if tokenizer is None else TextStream(tokenizer, stop)

    @property
    def done(self) -> bool:
        """Whether an end token or a stop string came."""
        return bool(self.completion.finish_reason)

    def take(self, token: int, ends: Set[int]) -> None:
        """The next token; what comes after the end is passed over."""
        if self.done:
            return
        self.completion.token_ids.append(token)
        if token in ends:
            self.completion.finish_reason = "eos"
        if self._stream is None:
            return
        piece = self._stream.put(token)
        if self._stream.stopped:
            self.completion.finish_reason = "stop"
        if self._on_text is not None:
            self._on_text(self._index, piece)

    def finish(self, reason: str) -> None:
        """End the row, for this reason where it did not end by itself."""
        self.completion.finish_reason = self.completion.finish_reason or reason
        if self._stream is None:
            return
        rest = self._stream.end()
        if rest and self._on_text is not None:
            self._on_text(self._index, rest)
        self.completion.text = self._stream.text
