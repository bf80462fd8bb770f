"""Greedy answers to the last question of each row, in batches."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mllama.data.rows import Example
from mllama.processing.conversation import encode_batch
from mllama.processing.messages import as_text


@dataclass(frozen=True)
class Answer:
    """The model's answer.

    Attributes:
        text: without white space at its ends.
        tokens: their number, the end token included.
        finish_reason: "eos", or "length" where it was cut.
        seconds: of its batch, divided by the batch's rows.
    """

    text: str
    tokens: int
    finish_reason: str
    seconds: float


def answer_rows(
    session: Any,
    examples: Sequence[Example],
    max_new_tokens: int,
    batch_size: int,
    progress: Callable[[int], None] = lambda rows: None,
) -> list[Answer]:
    """The answer to each row's last question, with the turns before it as they are in the row.

    Rows of a batch have as many images, and are of similar length. An answer does not depend on its
    batch beyond the rounding of sums.

    Args:
        session: a `mllama.runtime.session.Session` with a processor.
        examples: conversations that end with an answer, which the model does not see.
        max_new_tokens: maximum length of an answer.
        batch_size: rows of a batch.
        progress: called with the number of rows of each batch.

    Raises:
        ValueError: a row cannot be encoded, or fills the model's context; names the row.
    """
    found: list[Answer | None] = [None] * len(examples)
    for places in _batches(examples, batch_size):
        rows = [examples[place] for place in places]
        made = _named(lambda rows: _generate(session, rows, max_new_tokens), rows)
        seconds = made.timings.total_seconds / len(rows)
        for place, row in zip(places, made.completions, strict=True):
            text = (row.text or "").strip()
            found[place] = Answer(text, len(row.token_ids), row.finish_reason, round(seconds, 4))
        progress(len(rows))
    return [one for one in found if one is not None]


def _batches(examples: Sequence[Example], size: int) -> Iterator[list[int]]:
    """Places of rows with as many images, the longest texts first: what does not fit in memory does
    not fit at once.
    """

    def key(place: int) -> tuple[int, int]:
        asked = examples[place].messages[:-1]
        length = sum(len(as_text(message["content"])) for message in asked)
        return len(examples[place].images), length

    keys = {place: key(place) for place in range(len(examples))}
    order = sorted(keys, key=keys.__getitem__, reverse=True)
    start = 0
    while start < len(order):
        images = keys[order[start]][0]
        batch = [place for place in order[start : start + size] if keys[place][0] == images]
        yield batch
        start += len(batch)


def _generate(session: Any, rows: Sequence[Example], max_new_tokens: int) -> Any:
    asked = [row.messages[:-1] for row in rows]
    inputs = encode_batch(session.processor, asked, [()] * len(rows))
    return session.generate(inputs, max_new_tokens=max_new_tokens, do_sample=False)


def _named(generate: Callable[[Sequence[Example]], Any], rows: Sequence[Example]) -> Any:
    """Generate; where that fails, find the row and name it."""
    try:
        return generate(rows)
    except (ValueError, OSError):
        for row in rows:
            try:
                generate([row])
            except (ValueError, OSError) as error:
                raise ValueError(f"{row.where}: {error}") from error
        raise
