"""The most memory of a process that trains adapters: four layers of Llama-3.2-1B's sizes and its
whole vocabulary, rank 16 on all linear layers of the decoder, bfloat16 activations. Beside packed
weights, beside dense ones, and by transformers and PEFT, each in a process of its own.

    python -m benchmarks.models.train_memory [--tokens 512] [--steps 2] [--work FOLDER]
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.models.files import LLAMA_1B, TINY, TINY_TILED, Files
from benchmarks.models.worker import Worker
from mllama.hf.quantizing import quantize

CONFIG = LLAMA_1B | {"num_hidden_layers": 4}
WORK = Path("build/train-memory")
PEER = "transformers and PEFT, bf16"


class Setup(NamedTuple):
    """A worker of benchmarks/peers, and the format of the frozen weights in its folder."""

    name: str
    worker: str
    packed: str | None = None


SETUPS = (
    Setup(PEER, "transformers_lora"),
    Setup("mllama, bf16", "mllama_lora"),
    Setup("mllama, packed bf16", "mllama_lora", "bf16"),
    Setup("mllama, int8", "mllama_lora", "int8"),
    Setup("mllama, int4", "mllama_lora", "int4"),
)


def measure(files: Files, setup: Setup, tokens: int, steps: int, threads: int) -> dict[str, Any]:
    """Peaks of a process in bytes, VmHWM: once the model is open, and after some steps with AdamW
    on one sequence.
    """
    folder = files.llama()
    if setup.packed is not None:
        folder = files.make(
            f"llama-{setup.packed}",
            lambda path: quantize(files.llama(), path, setup.packed or "", report=False),
        )
    worker = Worker(setup.worker, sys.executable, folder, "bf16", threads)
    try:
        opened = worker.ask("nothing")["peak"]
        return {
            "opened": opened,
            "trained": worker.ask("steps", tokens=tokens, steps=steps)["peak"],
        }
    finally:
        worker.close()


def main(argv: list[str] | None = None) -> dict[str, dict[str, Any]]:
    """Print a table, and return what is in it by name."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.models.train_memory")
    parser.add_argument("--tokens", type=int, default=512, help="of the sequence (default: 512)")
    parser.add_argument("--steps", type=int, default=2, help="after one (default: 2)")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--work", type=Path, default=WORK, help="folder of the model files")
    parser.add_argument("--quick", action="store_true", help="a smoke run on a tiny model")
    arguments = parser.parse_args(argv)
    files = Files(arguments.work, TINY if arguments.quick else CONFIG, TINY_TILED)
    found: dict[str, dict[str, Any]] = {}
    print("| | open, GB | trained, GB | of the peer |\n|---|---|---|---|")
    for setup in SETUPS:
        peaks = measure(files, setup, arguments.tokens, arguments.steps, arguments.threads)
        found[setup.name] = peaks
        share = peaks["trained"] / found[PEER]["trained"]
        opened, trained = (f"{peaks[name] / 1e9:.2f}" for name in ("opened", "trained"))
        print(f"| {setup.name} | {opened} | {trained} | {share:.0%} |", flush=True)
    return found


if __name__ == "__main__":
    main()
