"""Scores of answers against reference answers."""

import functools
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from mllama.evaluate.packages import needed
from mllama.evaluate.vqa_text import normalize

_ANLS_THRESHOLD = 0.5
References = Sequence[Sequence[str]]


class Scores(NamedTuple):
    """The result of a metric.

    Attributes:
        total: the score of all rows.
        rows: the score of each row alone. `total` is their mean, except BLEU's.
        how: what a report must say to be compared with others.
    """

    total: float
    rows: list[float]
    how: str = ""


@dataclass(frozen=True)
class Metric:
    """A metric of answers.

    Attributes:
        what: one line for help and reports.
        best: the highest score.
        compute: (answers, references) -> Scores. Every row has at least one reference.
    """

    what: str
    best: float
    compute: Callable[[Sequence[str], References], Scores]


def score(name: str, answers: Sequence[str], references: References) -> Scores:
    """Score answers by the metric of this name.

    Args:
        name: a key of `METRICS`.
        answers: one per row; may be empty.
        references: of each row, one or several.

    Raises:
        ValueError: the metric is unknown, there are no rows, a row has no references, their numbers
            differ, or a package of the extra `eval` is missing.
    """
    if name not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, got {name!r}")
    if len(answers) != len(references):
        raise ValueError(f"there are {len(answers)} answers, but references of {len(references)}")
    if not answers:
        raise ValueError("there are no answers to score")
    for row, own in enumerate(references, 1):
        if isinstance(own, str) or not own:
            raise ValueError(f"row {row} must have a list of reference answers, got {own!r}")
    return METRICS[name].compute(answers, references)


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """How far an answer agrees with annotators, three of the others being enough, averaged over
    leaving out each. With fewer than four references all others must agree; with one, the
    answer is right or wrong. All texts are normalized; the original code leaves references as
    they are where all are the same.
    """
    answer, texts = normalize(answer), [normalize(text) for text in references]
    agreeing, others = texts.count(answer), len(texts) - 1
    if not others:
        return float(agreeing)
    enough = min(3, others)
    without = min(1.0, (agreeing - 1) / enough)  # one of the agreeing left out
    beside = min(1.0, agreeing / enough)
    return (agreeing * without + (len(texts) - agreeing) * beside) / len(texts)


def anls(answer: str, references: Sequence[str]) -> float:
    """1 - the Levenshtein distance over the longer length, to the nearest reference; 0 from a
    distance of one half on. Case and white space are not compared.

    Source: Biten et al., Scene Text Visual Question Answering (2019).
    """
    distance = needed("rapidfuzz.distance", "anls").Levenshtein.normalized_distance
    nearest = min(distance(_plain(answer), _plain(text)) for text in references)
    return 1 - nearest if nearest < _ANLS_THRESHOLD else 0.0


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if a reference is the answer, but for white space and the form of its characters."""
    return float(any(_spaced(answer) == _spaced(text) for text in references))


def words(text: str) -> list[str]:
    """Lower-case words of letters and digits of any script, with their marks, such as vowel signs:
    the tokens of ROUGE-L and CIDEr.
    """
    text = unicodedata.normalize("NFC", text).lower()
    spaced = "".join(letter if unicodedata.category(letter)[0] in "LNM" else " " for letter in text)
    return [word for word in spaced.split() if any(map(str.isalnum, word))]


def _spaced(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _plain(text: str) -> str:
    return _spaced(text).lower()


def _mean_of(one: Callable[[str, Sequence[str]], float]) -> Callable:
    """A metric whose total is the mean of its rows."""

    @functools.wraps(one)
    def compute(answers: Sequence[str], references: References) -> Scores:
        rows = [one(answer, own) for answer, own in zip(answers, references, strict=True)]
        return Scores(sum(rows) / len(rows), rows)

    return compute


def _bleu(answers: Sequence[str], references: References) -> Scores:
    """BLEU-4 of the corpus; a row's own has n-grams of as many lengths as it is long."""
    sacrebleu = needed("sacrebleu", "bleu4")
    whole = sacrebleu.BLEU(lowercase=True)
    alone = sacrebleu.BLEU(lowercase=True, effective_order=True)
    most = max(map(len, references))
    streams = [
        [own[place] if place < len(own) else None for own in references] for place in range(most)
    ]
    total = whole.corpus_score(list(answers), streams).score
    rows = [
        alone.sentence_score(answer, list(own)).score
        for answer, own in zip(answers, references, strict=True)
    ]
    return Scores(total, rows, str(whole.get_signature()))


class _Words:
    """`words` as rouge_score's tokenizer: its own drops letters that are not ASCII."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def _rouge(answers: Sequence[str], references: References) -> Scores:
    """The longest common subsequence's F1 with the nearest reference."""
    rouge = needed("rouge_score.rouge_scorer", "rouge_l").RougeScorer(
        ["rougeL"], tokenizer=_Words()
    )
    rows = [
        rouge.score_multi(list(own), answer)["rougeL"].fmeasure
        for answer, own in zip(answers, references, strict=True)
    ]
    return Scores(sum(rows) / len(rows), rows, "F1, no stemming")


def _cider(answers: Sequence[str], references: References) -> Scores:
    """CIDEr-D of pycocoevalcap, whose own tokenizer is a Java program."""
    if len(answers) < 2:
        raise ValueError("cider needs at least two rows: it weighs words by how few rows have them")
    scorer = needed("pycocoevalcap.cider.cider", "cider").Cider()
    texts = {row: [" ".join(words(text)) for text in own] for row, own in enumerate(references)}
    given = {row: [" ".join(words(answer))] for row, answer in enumerate(answers)}
    how = "CIDEr-D, words of letters and digits instead of PTB's tokens"
    if not any(text for own in texts.values() for text in own):
        return Scores(0.0, [0.0] * len(answers), how)
    total, rows = scorer.compute_score(texts, given)
    return Scores(float(total), [float(row) for row in rows], how)


METRICS = {
    "vqa_accuracy": Metric("agreement with annotators, as in VQA v2", 1.0, _mean_of(vqa_accuracy)),
    "anls": Metric("similarity of letters, 0 below one half", 1.0, _mean_of(anls)),
    "exact_match": Metric("share of answers that are a reference", 1.0, _mean_of(exact_match)),
    "bleu4": Metric("BLEU-4 of captions, lower case", 100.0, _bleu),
    "rouge_l": Metric("ROUGE-L of captions", 1.0, _rouge),
    "cider": Metric("CIDEr-D of captions", 10.0, _cider),
}
