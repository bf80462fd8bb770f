"""Curves and sample answers as PNG files, by matplotlib without a display."""

import textwrap
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mllama.checkpoints.files import write_file
from mllama.train.log import Log

_WIDTH = 48  # characters of a line beside an image
_LONGEST = 400  # characters of a text
_SIZE = 256  # pixels of an image


@dataclass(frozen=True)
class Sample:
    """A question with its images, its answer and the model's."""

    question: str
    expected: str
    answer: str
    images: tuple[Any, ...] = ()  # of PIL


def plot_curves(log: Log, path: Path) -> None:
    """Write the curves of loss, evaluation loss and learning rate."""
    figure = _figure(8, 6)
    losses, rates = figure.subplots(2, 1, sharex=True)
    for name, axes, mark in (
        ("loss", losses, ""),
        ("eval_loss", losses, "o"),
        ("learning_rate", rates, ""),
    ):
        steps, values = log.values(name)
        if steps:
            axes.plot(steps, values, marker=mark, label=name.replace("_", " "))
    losses.set_ylabel("loss")
    losses.legend()
    rates.set_ylabel("learning rate")
    rates.set_xlabel("step")
    for axes in (losses, rates):
        axes.grid(alpha=0.3)
    _write(figure, path)


def plot_samples(samples: Sequence[Sample], path: Path) -> None:
    """Write answers below each other, the first image of each to the left of its text."""
    figure = _figure(8, 2.2 * len(samples))
    rows = figure.subplots(len(samples), 2, squeeze=False, width_ratios=[1, 2])
    for (left, right), sample in zip(rows, samples, strict=True):
        left.axis("off")
        right.axis("off")
        if sample.images:
            image = sample.images[0].convert("RGB")
            image.thumbnail((_SIZE, _SIZE))
            left.imshow(image)
        if len(sample.images) > 1:
            left.set_title(f"1 of {len(sample.images)} images", fontsize=8)
        lines = (
            ("question", sample.question),
            ("expected", sample.expected),
            ("answer", sample.answer),
        )
        text = "\n".join(f"{name}: {_folded(value)}" for name, value in lines)
        right.text(0, 0.95, text, va="top", fontsize=9, family="monospace", parse_math=False)
    _write(figure, path)


def _folded(text: str) -> str:
    short = text[:_LONGEST] + " ..." * (len(text) > _LONGEST)
    plain = "".join(one if one.isprintable() else " " for one in short)
    return textwrap.fill(plain, _WIDTH, subsequent_indent="  ")


def _figure(width: float, height: float) -> Any:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _write(figure: Any, path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # letters that the font does not have
        write_file(path, lambda aside: figure.savefig(aside, format="png", dpi=100))
