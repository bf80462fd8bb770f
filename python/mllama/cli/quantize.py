"""`mllama quantize IN OUT`: a model with packed weights, and what they cost in accuracy."""

import argparse
import json
from typing import Any

from mllama.cli.inspect import bytes_text
from mllama.hf.quantizing import REPORT, quantize

_SHOWN = 5  # layers


def run(arguments: argparse.Namespace) -> None:
    """Quantize a model and print the report."""
    found = quantize(
        arguments.source,
        arguments.target,
        arguments.weights,
        dtype=arguments.dtype,
        calibration=arguments.calibrate,
        text=arguments.text,
        report=not arguments.no_report,
        force=arguments.force,
        adapter=arguments.adapter,
    )
    if arguments.json:
        print(json.dumps(found))
        return
    merged = "" if arguments.adapter is None else f", with {arguments.adapter} merged"
    print(f"{arguments.target}: weights packed as {arguments.weights}{merged}")
    if found:
        print("\n".join(_page(found)))


def _page(found: dict[str, Any]) -> list[str]:
    lines = [
        f"{when + ' packing':16}{bytes_text(total):>12}  {_by_type(types)}"
        for when, types in _types(found["bytes"]).items()
        if (total := sum(types.values())) is not None
    ]
    if "perplexity" in found:
        shown = [f"{value:.4f} {name}" for name, value in found["perplexity"].items()]
        if "change" in found["perplexity"]:
            shown[-1] = f"{found['perplexity']['change']:+.2f} %"
        lines.append(f"perplexity of {found['tokens']} tokens: {', '.join(shown)}")
    if "logits" in found:
        logits = found["logits"]
        lines.append(
            f"logits: mean error {logits['mean_error']:.4f}, largest {logits['max_error']:.4f}, "
            f"KL divergence {logits['kl_divergence']:.5f}, "
            f"same choice {logits['same_choice']:.1%}"
        )
        worst = sorted(found["layers"].items(), key=lambda item: -item[1])[:_SHOWN]
        lines += [f"  {name:60}{error:8.2%}" for name, error in worst]
    if "skipped" in found:
        lines.append(f"not compared: {found['skipped']}")
    return [*lines, f"all of it: {REPORT}"]


def _types(sizes: dict[str, dict[str, dict[str, int]]]) -> dict[str, dict[str, int]]:
    """{"before" or "after": {type: bytes}} of all parts."""
    found: dict[str, dict[str, int]] = {}
    for when, parts in sizes.items():
        sums = found.setdefault(when, {})
        for types in parts.values():
            for kind, size in types.items():
                sums[kind] = sums.get(kind, 0) + size
    return found


def _by_type(types: dict[str, int]) -> str:
    return ", ".join(f"{kind} {bytes_text(size)}" for kind, size in types.items())
