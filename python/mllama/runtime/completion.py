"""Results of generation."""

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, field
from typing import Any

from mllama.runtime.progress import Timings
from mllama.runtime.streaming import TextStream


@dataclass
class Completion:
    """The completion of one row.

    Attributes:
        token_ids: generated ids, including the end token.
        text: without special tokens, cut before a stop string; None without a processor.
        finish_reason: "eos", "stop" (a stop string), "length" (max_new_tokens or the context), or
            "interrupted".
    """

    token_ids: list[int] = field(default_factory=list)
    text: str | None = None
    finish_reason: str = ""


@dataclass
class Generation:
    """The result of one call.

    Attributes:
        completions: one per row.
        num_prompt_tokens: length of the prompts, padding included.
        num_reused_tokens: number of these, in each row, that were already in the cache.
        num_drafted_tokens: tokens that were guessed and verified.
        num_accepted_tokens: those of them that were the right ones: each saved a pass.
        timings: seconds of each stage, and the images and tokens that it computed.
    """

    completions: list[Completion]
    num_prompt_tokens: int
    num_reused_tokens: int = 0
    num_drafted_tokens: int = 0
    num_accepted_tokens: int = 0
    timings: Timings = field(default_factory=Timings)


class Row:
    """The state of one row during generation.

    Args:
        index: index in the batch.
        tokenizer: decodes the row's text; None for ids alone.
        stop: strings that end the row.
        on_text: called with the text of each token.
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
        """Whether an end token or a stop string was generated."""
        return bool(self.completion.finish_reason)

    def take(self, token: int, ends: Set[int]) -> None:
        """Add the next token; ignored after the end."""
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
        """End the row with this reason, unless it has already ended."""
        self.completion.finish_reason = self.completion.finish_reason or reason
        if self._stream is None:
            return
        rest = self._stream.end()
        if rest and self._on_text is not None:
            self._on_text(self._index, rest)
        self.completion.text = self._stream.text
