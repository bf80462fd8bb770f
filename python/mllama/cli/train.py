"""`mllama train CONFIG.yaml`."""

import argparse
import json
import shlex
import sys
from dataclasses import asdict
from typing import Any

from mllama.cli._training import given_settings
from mllama.train.checks import run_checks
from mllama.train.run import SETTINGS, TrainResult, train
from mllama.train.settings import TrainSettings, load_settings

_BAD_ROWS = 10  # that the summary names


def run(arguments: argparse.Namespace) -> int:
    """Train and print a summary. Returns 0, or 128 + the number of the signal that stopped the run
    (130 for Ctrl-C, 143 for SIGTERM). With --check 1 if a check fails.
    """
    settings = load_settings(arguments.config, given_settings(arguments))
    if arguments.check:
        return _check(settings, arguments)
    result = train(settings, resume=arguments.resume)
    if _is_first():
        if arguments.json:
            print(json.dumps(asdict(result), default=str))
        else:
            print("\n".join(_summary(settings, result)))
        if result.signal is not None:
            again = shlex.join(["mllama", "train", str(result.output / SETTINGS), "--resume"])
            print(
                f"mllama: stopped by signal {result.signal} after step {result.step}; to go on: "
                f"{again}",
                file=sys.stderr,
            )
    return 0 if result.signal is None else 128 + result.signal


def _check(settings: TrainSettings, arguments: argparse.Namespace) -> int:
    if arguments.resume:
        raise ValueError("--check begins no run, so there is none to --resume")
    checks = run_checks(settings)
    if arguments.json:
        print(json.dumps([asdict(check) for check in checks]))
    else:
        print("\n".join(map(str, checks)))
    return 0 if all(check.passed for check in checks) else 1


def _is_first() -> bool:
    from accelerate import PartialState

    return PartialState().is_main_process


def _summary(settings: TrainSettings, result: TrainResult) -> list[str]:
    lines = [
        f"steps            {result.step} of {result.steps}",
        f"trained tokens   {result.trained_tokens:,}",
        f"loss             {result.loss:.4f}",
    ]
    if result.best_loss is not None:
        lines.append(f"best evaluation  {result.best_loss:.4f}, step {result.best_step}")
    if result.bad_rows:
        lines.append(f"skipped rows     {len(result.bad_rows)}")
        lines += [f"  {row}" for row in result.bad_rows[:_BAD_ROWS]]
    if result.trained is not None:
        lines += [
            f"written to       {result.trained}",
            f"try it           {_command(settings, result)}",
        ]
    return lines


def _command(settings: TrainSettings, result: TrainResult) -> str:
    """How to use what was trained."""
    words: list[Any] = ["mllama", "ask", "IMAGE", "QUESTION"]
    if settings.method == "full":
        words += ["--model", result.trained]
    else:
        words += [] if settings.model is None else ["--model", settings.model]
        words += ["--adapter", result.trained]
    return shlex.join(map(str, words))
