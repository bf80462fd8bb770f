"""`mllama eval DATA`: answers to the rows of a data set, scored."""

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from mllama import __version__
from mllama.api import load_quietly, say_loaded
from mllama.cli._answering import check_reference, image_cache
from mllama.data.sources import open_examples
from mllama.device import dtype_name
from mllama.evaluate import Evaluation
from mllama.evaluate import run as evaluate
from mllama.evaluate.report import PAGE, REPORT, report_of, write_report
from mllama.quant.packer import packing_of

_KEYS = ("data", "image_folder", "question", "split", "limit", "model", "adapter", "metrics")
_KEYS += ("max_new_tokens", "batch_size", "max_length", "kv_cache", "reference", "gpu_layers")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate, print the scores, and write the report."""
    check_reference(arguments)
    _check_output(arguments.output)
    found = open_examples(
        arguments.data,
        arguments.image_folder,
        arguments.question,
        arguments.split,
        arguments.skip_bad_rows,
    )
    examples = found[: arguments.limit]
    model, processor = load_quietly(
        arguments.model,
        arguments.dtype,
        arguments.device,
        arguments.reference or "meta",
        arguments.adapter,
        arguments.weights,
        None,
        arguments.gpu_layers,
    )
    say_loaded(arguments.model, model)
    with _Bars(len(examples)) as bars:
        result = evaluate(
            model,
            processor,
            examples,
            arguments.metrics,
            arguments.max_new_tokens,
            arguments.batch_size,
            arguments.max_length,
            arguments.kv_cache,
            image_cache(arguments),
            bars,
        )
    settings = _settings(arguments, model)
    if arguments.output is not None:
        write_report(arguments.output, result, examples, settings, found.bad_rows)
    if arguments.json:
        shown = report_of(result, settings, found.bad_rows)
        print(json.dumps({name: value for name, value in shown.items() if name != "rows"}))
        return
    print("\n".join(_page(result, found.bad_rows)))
    if arguments.output is not None:
        print(f"written: {arguments.output}{os.sep}{REPORT} and {PAGE}")


def _check_output(folder: str | None) -> None:
    """Before hours of answers: the report can be written there."""
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise NotADirectoryError(f"--output: {folder} exists and is not a folder")


def _settings(arguments: argparse.Namespace, model: Any) -> dict[str, Any]:
    first = next(model.parameters())
    return {name: getattr(arguments, name) for name in _KEYS} | {
        "dtype": dtype_name(first.dtype),
        "device": str(first.device),
        "weights": packing_of(model),
        "version": __version__,
    }


def _page(result: Evaluation, bad_rows: list[str]) -> list[str]:
    lines = [f"{len(result.rows)} rows"]
    for name, one in result.scores.items():
        said = f"{one.what} ({one.how})" if one.how else one.what
        lines.append(f"  {name:14}{one.total:>10.4f}  {said}")
    lines += [f"  {stage:14}{seconds:>9.1f} s" for stage, seconds in result.seconds.items()]
    if bad_rows:
        lines.append(f"{len(bad_rows)} bad rows were left out:")
        lines += [f"  {reason}" for reason in bad_rows]
    return lines


class _Bars:
    """Shows on a terminal how many rows of a stage are done."""

    def __init__(self, total: int):
        self._total, self._stage, self._bar = total, "", None

    def __call__(self, stage: str, rows: int) -> None:
        from tqdm import tqdm  # slow to import

        if stage != self._stage:
            self._close()
            shown = sys.stderr.isatty()
            self._stage = stage
            self._bar = tqdm(total=self._total, desc=stage, leave=False, disable=not shown)
        self._bar.update(rows)

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def __enter__(self) -> "_Bars":
        return self

    def __exit__(self, *error: object) -> None:
        self._close()
