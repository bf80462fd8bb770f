"""Speculative decoding: several tokens per pass. Tokens that may come next are guessed, and one
pass over all of them gives the logits that the same tokens would have had one by one.
"""

from typing import Any, Protocol

import torch

from mllama.model.fast_decoder import MAX_ROWS
from mllama.nn.checks import check_count
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.prefill import PromptCache
from mllama.runtime.prefix import common
from mllama.runtime.progress import Stages

MAX_DRAFTS = MAX_ROWS - 1  # beside the token before them
_COUNTS = (1, 3, 7, 15)  # with the token before them, what products take at once
_ROW_COST = 0.15  # of a further position in a pass, in passes of one
_NGRAMS = (4, 3, 2)  # tokens, the longest first
_PAUSE = 16  # tokens without drafts where a draft model does not pay


class Drafter(Protocol):
    """Guesses the next tokens of one row."""

    def begin(self, ids: list[int]) -> None:
        """Start with a prompt."""

    def add(self, token: int) -> None:
        """Append the next token."""

    def propose(self, most: int) -> list[int]:
        """Guess up to `most` tokens that may follow."""


class AcceptanceRate:
    """The share of guesses that were right, the latest ones weighing most.

    Attributes:
        value: 0 to 1.
    """

    def __init__(self) -> None:
        self.value = 0.5
        self._expected: list[int] = []

    def expect(self, tokens: list[int]) -> None:
        """Compare the next tokens with these, up to the first one that is another."""
        self._expected = list(tokens)

    def add(self, token: int) -> None:
        """Compare the next token, if one is expected."""
        if not self._expected:
            return
        right = self._expected.pop(0) == token
        self.value += (right - self.value) / 8
        if not right:
            self._expected = []

    def best_count(self, most: int, cost: float) -> int:
        """How many drafts, 0 to `most`, give the most tokens per time, if one costs `cost`, in
        passes without drafts.
        """
        counts = {0, *(min(count, most) for count in _COUNTS)}
        return max(sorted(counts), key=lambda count: self._tokens(count) / (1 + cost * count))

    def _tokens(self, drafts: int) -> float:
        """Expected number of tokens of a pass."""
        return sum(self.value**place for place in range(drafts + 1))


class PromptLookup:
    """Guesses that the text goes on as it did where its last tokens stood before, in the prompt or
    the answer. The longest match counts, and of these the latest.

    Each length of matches has a rate of its own. A guess that is not drafted, because few of its
    kind were right, is compared all the same: the rate rises again where the text repeats itself.

    Args:
        most: drafts in one pass.
    """

    def __init__(self, most: int):
        self._most = most
        self._rates = {size: AcceptanceRate() for size in _NGRAMS}
        self.begin([])

    def begin(self, ids: list[int]) -> None:
        """Start with a prompt."""
        self._ids: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}  # where the token after an n-gram is
        self._rate: AcceptanceRate | None = None  # of the last guess
        for token in ids:
            self.add(token)

    def add(self, token: int) -> None:
        """Append the next token."""
        if self._rate is not None:
            self._rate.add(token)
        for size in _NGRAMS:
            if size <= len(self._ids):
                self._next[tuple(self._ids[-size:])] = len(self._ids)
        self._ids.append(token)

    def propose(self, most: int) -> list[int]:
        """Guess up to `most` tokens that may follow."""
        ids, most = self._ids, min(most, self._most)
        self._rate = None
        size = next((size for size in _NGRAMS if tuple(ids[-size:]) in self._next), None)
        if size is None or most < 1:
            return []
        start, guess = self._next[tuple(ids[-size:])], []
        for place in range(start, start + most):  # it may run into what it guesses
            guess.append(ids[place] if place < len(ids) else guess[place - len(ids)])
        self._rate = self._rates[size]
        self._rate.expect(guess)
        return guess[: self._rate.best_count(most, _ROW_COST)]


class DraftModel:
    """Guesses the likeliest tokens of a smaller model, whose cache follows the text. Images are
    left out of its prompts.

    Args:
        model: a `VisionLanguageModel` of text, in eval mode.
        target: the model whose tokens are guessed.
    """

    def __init__(self, model: Any, target: Any):
        self._model = model
        self._no_text = target.spec.image_token_index
        self._prompt = PromptCache(model, ImageCache(), None, 1024)
        self._cost = _ROW_COST + _bytes(model) / _bytes(target)
        self._rate = AcceptanceRate()
        self.begin([])

    def begin(self, ids: list[int]) -> None:
        """Start with a prompt. It is read when the first draft is asked for."""
        vocabulary = self._model.spec.text.vocab_size
        self._ids = [token for token in ids if token < vocabulary and token != self._no_text]
        self._known: int | None = None  # leading ids that the cache surely has; None: another text
        self._rate.expect([])
        self._pause = 0

    def add(self, token: int) -> None:
        """Append the next token."""
        self._rate.add(token)
        self._ids.append(token)
        self._pause -= 1

    def propose(self, most: int) -> list[int]:
        """Guess up to `most` tokens that may follow."""
        room = self._model.spec.text.max_position_embeddings - len(self._ids)
        most = min(most, MAX_DRAFTS, room)
        if most < 1 or not self._ids or self._pause > 0:
            return []
        count = self._rate.best_count(most, self._cost)
        if not count:
            count, self._pause = 1, _PAUSE
        logits, drafts = self._read(), []
        while True:
            token = logits.argmax(-1)  # (1,)
            drafts.append(int(token))
            if len(drafts) == count:
                break
            logits = self._prompt.append(token[:, None])[:, -1]
        self._rate.expect(drafts)
        return drafts

    def _read(self) -> torch.Tensor:
        """The logits [1, V] after the text."""
        device = next(self._model.parameters()).device
        if self._known is None:
            self._prompt.restore()
            ids = torch.tensor([self._ids], device=device)
            logits, _ = self._prompt.prefill({"input_ids": ids}, Stages())
        else:
            cached, known = self._prompt.ids, self._known
            known += common(cached[known:], self._ids[known:-1])
            self._prompt.drop_last(len(cached) - known)
            ids = torch.tensor([self._ids[known:]], device=device)
            logits = self._prompt.append(ids)[:, -1]
        self._known = len(self._ids)
        return logits


def make_drafter(model: Any, prompt_lookup_tokens: int, draft_model: Any) -> Drafter | None:
    """What guesses a session's tokens; None without options.

    Args:
        model: the session's.
        prompt_lookup_tokens, draft_model: as `Session` takes them.

    Raises:
        TypeError, ValueError: as `Session`.
    """
    check_count("prompt_lookup_tokens", prompt_lookup_tokens, 0)
    if prompt_lookup_tokens > MAX_DRAFTS:
        raise ValueError(
            f"prompt_lookup_tokens must be at most {MAX_DRAFTS}, got {prompt_lookup_tokens}"
        )
    if draft_model is None:
        return PromptLookup(prompt_lookup_tokens) if prompt_lookup_tokens else None
    if prompt_lookup_tokens:
        raise ValueError("give one of prompt_lookup_tokens and draft_model, not both")
    if not hasattr(draft_model, "compute"):
        raise TypeError(
            f"draft_model must be a VisionLanguageModel, got {type(draft_model).__name__}"
        )
    if draft_model is model:
        raise ValueError("draft_model must be another model than the session's")
    if draft_model.spec.encoder is not None:
        raise ValueError("draft_model must be a model of text, got one that takes images")
    own, other = model.spec.text.vocab_size, draft_model.spec.text.vocab_size
    if own != other:
        raise ValueError(f"draft_model must have the same vocabulary, {own} ids, got {other}")
    return DraftModel(draft_model, model)


def _bytes(model: Any) -> int:
    """Memory of what a pass reads."""
    parts = (model.language_model.layers, model.lm_head)
    tensors = (t for part in parts for t in (*part.parameters(), *part.buffers()))
    return sum(t.numel() * t.element_size() for t in tensors)
