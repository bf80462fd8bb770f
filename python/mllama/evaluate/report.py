"""Writes an evaluation: a JSON report, and a page of the worst rows with their images."""

import base64
import dataclasses
import io
import json
import math
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from mllama.checkpoints.files import write_folder
from mllama.data.rows import Example
from mllama.evaluate.run import Evaluation, Row
from mllama.processing.image import load_image

REPORT, PAGE = "report.json", "worst.html"
WORST = 50  # rows on the page
_SIDE = 320  # pixels of an image's longer side
_QUALITY = 80
_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.2rem .8rem .2rem 0;text-align:left}"
    "article{border-top:1px solid #999;padding:1rem 0;display:flex;gap:1rem;flex-wrap:wrap}"
    "img{max-width:100%}dt{color:#666}dd{margin:0 0 .4rem;white-space:pre-wrap}"
    "small{color:#666}"
)
# No script, and nothing from elsewhere.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(
    folder: str | Path,
    evaluation: Evaluation,
    examples: Sequence[Example],
    settings: Mapping[str, Any],
    bad_rows: Sequence[str] = (),
) -> None:
    """Write REPORT and PAGE into a folder, atomically.

    Args:
        folder: created if needed; an older report in it is replaced, other files stay.
        evaluation: the result.
        examples: its rows, in the same order.
        settings: what was evaluated, how; JSON values.
        bad_rows: what was wrong with rows that were left out.

    Raises:
        OSError: the folder cannot be written.
    """
    by_row = {id(row): example for row, example in zip(evaluation.rows, examples, strict=True)}
    worst = [(row, by_row[id(row)]) for row in evaluation.worst()[:WORST]]
    page = page_of(evaluation, worst, settings)
    text = json.dumps(report_of(evaluation, settings, bad_rows), indent=2, ensure_ascii=False)

    def write(aside: Path) -> None:
        (aside / REPORT).write_text(text + "\n", encoding="utf-8")
        (aside / PAGE).write_text(page, encoding="utf-8")

    write_folder(Path(folder), write)


def report_of(
    evaluation: Evaluation, settings: Mapping[str, Any], bad_rows: Sequence[str] = ()
) -> dict[str, Any]:
    """The report as JSON values; what is not finite is a text."""
    found = {
        "settings": dict(settings),
        "metrics": {name: dataclasses.asdict(one) for name, one in evaluation.scores.items()},
        "seconds": evaluation.seconds,
        "bad_rows": list(bad_rows),
        "rows": [dataclasses.asdict(row) for row in evaluation.rows],
    }
    return _finite(found)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(one) for one in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def page_of(
    evaluation: Evaluation, worst: Sequence[tuple[Row, Example]], settings: Mapping[str, Any]
) -> str:
    """The page: one file, with small copies of the images in it."""
    scores = "".join(
        f"<tr><td>{escape(name)}</td><td>{_number(one.total)}</td>"
        f"<td><small>{escape(' - '.join(filter(None, (one.what, one.how))))}</small></td></tr>"
        for name, one in evaluation.scores.items()
    )
    first = next(iter(evaluation.scores))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{escape(_POLICY)}">'
        f"<title>Worst answers</title><style>{_STYLE}</style></head><body>\n"
        f"<h1>{escape(str(settings.get('model') or 'the embedded model'))}</h1>\n"
        f"<p>{len(evaluation.rows)} rows of {escape(str(settings.get('data', '')))}</p>\n"
        f"<table>{scores}</table>\n"
        f"<h2>The {len(worst)} worst rows by {escape(first)}</h2>\n"
        f"{''.join(map(_article, *zip(*worst, strict=True))) if worst else ''}</body></html>\n"
    )


def _article(row: Row, example: Example) -> str:
    images = "".join(map(_image, example.images))
    answer = "not generated" if row.answer is None else row.answer.text
    scores = ", ".join(f"{name} {_number(value)}" for name, value in row.scores.items())
    return (
        f"<article><div>{images}</div><div><small>{escape(row.where)}; {escape(scores)}</small><dl>"
        f"<dt>question</dt><dd>{escape(row.question)}</dd>"
        f"<dt>answer</dt><dd>{escape(answer)}</dd>"
        f"<dt>right</dt><dd>{escape(' | '.join(row.references))}</dd></dl></div></article>\n"
    )


def _image(image: Any) -> str:
    """A small JPEG of an image, in the page itself."""
    small = load_image(image).convert("RGB")
    small.thumbnail((_SIDE, _SIDE))
    data = io.BytesIO()
    small.save(data, "JPEG", quality=_QUALITY)
    text = base64.b64encode(data.getvalue()).decode()
    return f'<img alt="" src="data:image/jpeg;base64,{text}"> '


def _number(value: float) -> str:
    return f"{value:.4g}"
