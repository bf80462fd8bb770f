"""Evaluates a model on rows: answers, scores, and what the report has of them."""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mllama.data.rows import Example
from mllama.evaluate.answers import Answer, answer_rows
from mllama.evaluate.metrics import METRICS, Scores, score
from mllama.evaluate.perplexity import perplexity
from mllama.nn.checks import check_count
from mllama.processing.messages import as_text
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.session import Session

PERPLEXITY = "perplexity"
WHAT_PERPLEXITY = "exp of the mean loss of the answers' tokens"
KNOWN = (PERPLEXITY, *METRICS)
DEFAULT = ("exact_match", "vqa_accuracy", PERPLEXITY)


@dataclass(frozen=True)
class Score:
    """A metric of all rows.

    Attributes:
        total: see `mllama.evaluate.metrics.METRICS` for the range.
        what: what it is.
        how: what must be said where it is compared.
    """

    total: float
    what: str
    how: str = ""


@dataclass(frozen=True)
class Row:
    """A row's result.

    Attributes:
        where: the row.
        question: the last question's text.
        references: the answers that count as right.
        answer: the model's; None if no metric needed one.
        scores: by metric.
    """

    where: str
    question: str
    references: tuple[str, ...]
    answer: Answer | None
    scores: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """The result of `run`.

    Attributes:
        scores: by metric, in the order asked for.
        rows: in the order of the data.
        seconds: by stage: "answers", "perplexity", "scores".
    """

    scores: dict[str, Score]
    rows: list[Row]
    seconds: dict[str, float] = field(default_factory=dict)

    def worst(self) -> list[Row]:
        """Rows by their score of the first metric, the worst first; by perplexity the highest."""
        name = next(iter(self.scores))
        sign = -1 if name == PERPLEXITY else 1
        return sorted(self.rows, key=lambda row: sign * row.scores[name])


def run(
    model: Any,
    processor: Any,
    examples: Sequence[Example],
    metrics: Sequence[str] = DEFAULT,
    max_new_tokens: int = 64,
    batch_size: int = 8,
    max_length: int | None = None,
    kv_cache: str | None = None,
    image_cache: ImageCache | None = None,
    progress: Callable[[str, int], None] = lambda stage, rows: None,
) -> Evaluation:
    """Answer the last question of each row greedily and score the answers.

    Args:
        model, processor: as `mllama.load` returns them.
        examples: as `mllama.data.sources.open_examples` returns them; or a list.
        metrics: names of KNOWN.
        max_new_tokens: maximum length of an answer.
        batch_size: rows that are answered together.
        max_length: tokens of a row for perplexity; longer rows are cut.
        kv_cache, image_cache: as `Session` takes them.
        progress: called with "answers" or "perplexity" and a number of rows that are done.

    Raises:
        TypeError: a number is no int.
        ValueError: a metric is unknown or given twice, there are no rows, an option is out of range
            or without effect, a row cannot be read or encoded, or a package of the extra `eval` is
            missing.
    """
    names = _check(metrics, max_new_tokens, batch_size, max_length)
    rows = list(examples)
    if not rows:
        raise ValueError("there are no rows to evaluate")
    references = [list(one.answers) or [as_text(one.messages[-1]["content"])] for one in rows]
    answered = [name for name in names if name != PERPLEXITY]
    for name in answered:  # what is missing or impossible, before hours of answers
        score(name, ["a"] * len(rows[:2]), references[:2])
    was_training, seconds = model.training, {}
    model.eval()
    try:
        start, answers, scores = time.perf_counter(), [None] * len(rows), {}
        if answered:
            session = _session(model, processor, kv_cache, image_cache)
            told = functools.partial(progress, "answers")
            answers = answer_rows(session, rows, max_new_tokens, batch_size, told)
            seconds["answers"] = time.perf_counter() - start
        if PERPLEXITY in names:
            start = time.perf_counter()
            told = functools.partial(progress, PERPLEXITY)
            scores[PERPLEXITY] = _perplexity(model, processor, rows, max_length, told)
            seconds[PERPLEXITY] = time.perf_counter() - start
    finally:
        model.train(was_training)
    start = time.perf_counter()
    for name in answered:
        scores[name] = score(name, [one.text for one in answers], references)
    seconds["scores"] = time.perf_counter() - start
    return Evaluation(
        {name: Score(scores[name].total, _what(name), scores[name].how) for name in names},
        [
            Row(
                row.where,
                as_text(row.messages[-2]["content"]),
                tuple(references[place]),
                answers[place],
                {name: scores[name].rows[place] for name in names},
            )
            for place, row in enumerate(rows)
        ],
        {stage: round(spent, 3) for stage, spent in seconds.items()},
    )


def _session(
    model: Any, processor: Any, kv_cache: str | None, image_cache: ImageCache | None
) -> Session:
    """Greedy: of the model's own settings for generation only the end tokens matter."""
    ends = model.generation_config.eos_token_id
    settings = {} if ends is None else {"eos_token_id": ends}
    return Session(model, processor, settings, kv_cache=kv_cache, image_cache=image_cache)


def _perplexity(
    model: Any,
    processor: Any,
    rows: Sequence[Example],
    max_length: int | None,
    progress: Callable[[int], None],
) -> Scores:
    found = perplexity(model, processor, rows, max_length, progress)
    return Scores(found.total, found.rows, f"{sum(found.tokens)} tokens")


def _what(name: str) -> str:
    return WHAT_PERPLEXITY if name == PERPLEXITY else METRICS[name].what


def _check(
    metrics: Sequence[str], max_new_tokens: int, batch_size: int, max_length: int | None
) -> list[str]:
    names = list(metrics)
    if isinstance(metrics, str) or not names:
        raise ValueError(f"metrics must be names of {', '.join(KNOWN)}, got {metrics!r}")
    for place, name in enumerate(names):
        if name not in KNOWN:
            raise ValueError(f"metrics must be of {', '.join(KNOWN)}, got {name!r}")
        if name in names[:place]:
            raise ValueError(f"metrics has {name} twice")
    check_count("max_new_tokens", max_new_tokens)
    check_count("batch_size", batch_size)
    if max_length is not None and PERPLEXITY not in names:
        raise ValueError("max_length is for perplexity, which is not among the metrics")
    return names
