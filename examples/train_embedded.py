"""Train the embedded model on generated images.

    python examples/train_embedded.py --out runs/embedded

--resume continues the run in --out. --export writes the averaged weights as a model folder for
`mllama.load`.
"""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path

import torch
from tqdm import tqdm

from shapes.training import Plan, Run


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("runs/embedded"), help="folder of the run")
    parser.add_argument(
        "--resume",
        action="store_true",
        help="continue from the weights and optimizer state in --out",
    )
    parser.add_argument(
        "--export",
        type=Path,
        help="folder to write the model to after training (at once with --pictures 0)",
    )
    parser.add_argument("--threads", type=int, default=2, help="1 if other jobs share the machine")
    parser.add_argument("--workers", type=int, default=1, help="processes that draw images")
    for field in fields(Plan):
        kind = (
            {"action": argparse.BooleanOptionalAction}
            if isinstance(field.default, bool)
            else {"type": type(field.default)}
        )
        parser.add_argument(f"--{field.name.replace('_', '-')}", default=field.default, **kind)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    plan = Plan(**{field.name: getattr(arguments, field.name) for field in fields(Plan)})
    run = Run(plan, arguments.out, resume=arguments.resume)
    if run.seen < plan.pictures:
        train(run, arguments.workers)
    if arguments.export:
        run.export(arguments.export)


def train(run: Run, workers: int) -> None:
    """Train to the end of the plan, with a progress bar on stderr."""
    with tqdm(
        total=run.plan.pictures, initial=run.seen, unit="image", smoothing=0.02, mininterval=2
    ) as progress:
        run.train(progress, workers=workers)


if __name__ == "__main__":
    main()
