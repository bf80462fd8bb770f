"""The ids of a conversation as a model read and wrote them."""

from collections.abc import Mapping
from typing import Any

import torch

from mllama.runtime.completion import Completion
from mllama.runtime.prefix import common

_PER_TOKEN = ("input_ids", "attention_mask", "token_type_ids", "cross_attention_mask")
_NEAR = 8  # tokens around the place where an answer is expected to end
_LAST = 8  # tokens at the end of an answer that the template may have joined with its own


class Transcript:
    """Keeps generated answers as the tokens that they were.

    A chat template writes answers as text, without white space at their ends. Encoded again they
    often become other tokens, which no cache has. `continue_with` puts the generated tokens back
    in, where the template has nothing else than the answer's text. A template that changes what it
    wrote for earlier prompts is followed instead, as for thoughts that it leaves out.

    Args:
        tokenizer: has `encode(text, add_special_tokens)` and `decode(ids, skip_special_tokens)`.
    """

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self.reset()

    def reset(self) -> None:
        """Forget the conversation."""
        self._written: list[int] = []  # the last answered prompt, as the template has it
        self._read: list[int] = []  # the same, as the model read it
        self._places: list[int] = []  # where each of these ids is in `_written`
        self._answer: list[int] = []  # without an end token, which is the template's to write
        self._text: str | None = None  # of the whole answer
        self._pending: tuple[list[int], list[int], list[int]] | None = None

    def continue_with(self, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The next prompt of the conversation, with earlier answers as they were generated.

        Args:
            inputs: a processor's output, one row without padding.
        """
        written = inputs["input_ids"][0].tolist()
        found = self._find_answer(written)
        if found is None:
            self._pending = written, written, list(range(len(written)))
            return dict(inputs)
        kept, end = found
        read = self._read + self._answer[:kept] + written[end:]
        places = self._places + [len(self._written)] * kept + list(range(end, len(written)))
        self._pending = written, read, places
        rows = torch.tensor(places).clamp(max=len(written) - 1)
        continued = {
            name: value[:, rows.to(value.device)] if name in _PER_TOKEN else value
            for name, value in inputs.items()
        }
        ids = inputs["input_ids"]
        return continued | {"input_ids": torch.tensor([read], dtype=ids.dtype, device=ids.device)}

    def answer(self, completion: Completion) -> None:
        """Add the answer to the last prompt. Without one the prompt is no part of the
        conversation.
        """
        if self._pending is None:
            return
        self._written, self._read, self._places = self._pending
        self._pending = None
        ids, reason = completion.token_ids, completion.finish_reason
        self._answer = ids[:-1] if reason == "eos" else list(ids)
        text = None if reason == "stop" else completion.text  # without the stop string's tokens
        self._text = None if text is None else text.strip()

    def _find_answer(self, written: list[int]) -> tuple[int, int] | None:
        """How many tokens of the answer are kept, and where the prompt goes on behind them; None if
        the prompt does not continue the last one.
        """
        start = len(self._written)
        if not start or common(self._written, written) < start:
            return None
        count = len(self._answer)
        for kept in range(count, max(count - _LAST, -1), -1):
            whole = kept == count and self._text is not None
            text = self._text if whole else self._decode(self._answer[:kept]).lstrip()
            about = start + len(self._tokenizer.encode(text, add_special_tokens=False))
            for end in range(max(about - _NEAR, start), min(about + _NEAR, len(written)) + 1):
                found = self._decode(written[start:end])
                if (found.strip() if whole else found.lstrip()) == text:
                    return kept, end
        return 0, start

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True)
