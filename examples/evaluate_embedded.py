"""Accuracy of a model on held-out generated images, by kind of question.

1,000 images of the training generator, or 200 images drawn by matplotlib:

    python examples/evaluate_embedded.py
    python examples/evaluate_embedded.py --renderer matplotlib
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from shapes.evaluation import evaluate, held_out_cases, summary
from shapes.other_renderer import matplotlib_case


def main() -> None:
    import mllama

    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="model folder (default: the embedded model)")
    parser.add_argument("--renderer", choices=("shapes", "matplotlib"), default="shapes")
    parser.add_argument(
        "--pictures", type=int, help="number of images (default: 1,000, or 200 with matplotlib)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--json", type=Path, help="file to write the figures to")
    parser.add_argument("--mistakes", type=int, default=0, help="number of wrong answers to print")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = mllama.load(arguments.model, dtype=arguments.dtype, device="cpu")
    if arguments.renderer == "shapes":
        cases = held_out_cases(arguments.pictures or 1000, arguments.seed)
    else:
        cases = [
            matplotlib_case(arguments.seed * 100_000 + i) for i in range(arguments.pictures or 200)
        ]
    wrong: list = []
    figures = {"renderer": arguments.renderer, "seed": arguments.seed} | evaluate(
        model, processor.tokenizer, cases, wrong
    )
    print(summary(figures))
    for case, turn, answer in wrong[: arguments.mistakes]:
        print(
            f"  {case.objects} objects, {case.background}: "
            f"{turn.question} -> {answer!r}, not {turn.answer!r}"
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
