"""A picture of the results: decoding, by model and bits, for each engine."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.models.report import OURS, PEERS


def draw(content: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: tokens per second of the case `decode`; nothing where that was not measured.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    groups = [group for group in content["groups"].values() if _decode(group)]
    if not groups:
        return
    models = list(dict.fromkeys(group["model"] for group in groups))
    figure = Figure(figsize=(4.5 * len(models), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    engines = (OURS, *PEERS)
    for place, model in enumerate(models):
        axes = figure.add_subplot(1, len(models), place + 1)
        own = [group for group in groups if group["model"] == model]
        for i, engine in enumerate(engines):
            rates = [max(_decode(group).get(engine, [0])) for group in own]
            at = [x + (i - len(engines) / 2 + 0.5) * 0.16 for x in range(len(own))]
            axes.bar(at, rates, 0.15, label=engine, color=f"C{i}")
        axes.set_title(f"{model}: tokens/s", fontsize=9)
        axes.set_xticks(range(len(own)), [group["bits"] for group in own])
        axes.spines[["top", "right"]].set_visible(False)
    axes.legend(fontsize=7, frameon=False)
    figure.savefig(path, dpi=90)


def _decode(group: Mapping[str, Any]) -> dict[str, list[float]]:
    """Rates of the case by engine."""
    found: dict[str, list[float]] = {}
    for row in group["rows"]:
        if row["case"] == "decode":
            found.setdefault(row["engine"], []).append(row["tokens_per_second"])
    return found
