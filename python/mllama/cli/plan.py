"""`mllama plan CONFIG.yaml`: the memory that a run needs, and the settings that would need less."""

import argparse
import dataclasses
import json

from mllama.cli._training import given_settings
from mllama.cli.inspect import bytes_text
from mllama.plan.machine import parse_bytes
from mllama.plan.run import Plan, Switch, plan
from mllama.train.settings import load_settings


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; exit code 1 if the run does not fit."""
    settings = load_settings(arguments.config, given_settings(arguments))
    memory = None if arguments.memory is None else parse_bytes(arguments.memory)
    found = plan(settings, memory, arguments.length, arguments.switches)
    print(json.dumps(dataclasses.asdict(found)) if arguments.json else "\n".join(_page(found)))
    return 1 if found.fits is False else 0


def _page(found: Plan) -> list[str]:
    work = found.work
    lines = [
        f"a pass of {work['rows']} x {work['tokens']} tokens, {work['images']} images and "
        f"{work['labels']} labels, in {work['dtype']}, weights {work['weights']} (the longest of "
        f"{work['looked at']} rows)",
        *_rows(found.parts),
        *_rows({"peak of a step": found.total}),
    ]
    if found.samples:
        lines += ["while a sample's answer is generated", *_rows(found.samples)]
        lines += _rows({"in all": sum(found.samples.values())})
    lines.append(_verdict(found))
    if found.switches:
        lines.append("with other settings")
        lines += [_line(switch) for switch in found.switches]
    return lines


def _rows(parts: dict[str, int]) -> list[str]:
    return [f"  {name:34}{bytes_text(size):>18}" for name, size in parts.items()]


def _verdict(found: Plan) -> str:
    if found.memory is None:
        return f"{found.device}: the system does not say how much memory is free: give --memory"
    does = "fits" if found.fits else "does not fit"
    return f"{does} in {bytes_text(found.memory)} of {found.device}, a tenth of it kept free"


def _line(switch: Switch) -> str:
    changes = ", ".join(f"{name}: {_yaml(value)}" for name, value in switch.changes.items())
    return f"  {bytes_text(switch.total):>18}{'  fits' if switch.fits else '      '}  {changes}"


def _yaml(value: object) -> str:
    return json.dumps(value) if isinstance(value, bool) else str(value)
