"""Every operator's benchmark on a GPU, against torch's best: eager or, where that fuses something,
compiled.
"""

import importlib
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch

from benchmarks import harness, shapes
from benchmarks.harness import Case

# torch.compile fuses these peers' elementwise work; the others are a library's kernel already.
FUSED = ("rms_norm", "add_rms_norm", "layer_norm", "rope", "gated")
NAMES = (
    *FUSED,
    "attention",
    "packed_linear",
    "dequantized_linear",
    "lora_linear",
    "patch_embed",
    "select_token",
    "quantized_rows",
    "image",
    "cross_entropy",
)
TINY = {"HIDDEN": 64, "FFN": 128, "VISION_HIDDEN": 48, "VOCABULARY": 512}


def measure_operators(device: str, seconds: float, tiny: bool) -> dict[str, Any]:
    """Rows of `harness.HEADER` by operator, and what no time was left for.

    Args:
        device: "cuda", or "cpu" for a smoke run.
        seconds: for all; each operator has an equal share of what is left.
        tiny: the first case of each, on the smallest sizes.
    """
    end, found, left_out = time.monotonic() + seconds, {}, []
    if tiny:
        shapes.use(**TINY)
    else:
        shapes.use(TEXT_LENGTHS=(1, 4096))
    for number, name in enumerate(NAMES):
        share = (end - time.monotonic()) / (len(NAMES) - number)
        stop, rows = time.monotonic() + share, []
        bench = importlib.import_module(f"benchmarks.ops.bench_{name}")
        with torch.device(device):
            for case in islice(_cases(bench, name, tiny), 1 if tiny else None):
                if time.monotonic() > stop:
                    left_out.append(f"{name} from {case.shape} on")
                    break
                if name in FUSED and case.direction == "forward":
                    case = _with_best_peer(case, "eager" if tiny else "inductor")
                rows.append(harness.table_row(harness.measure(case)))
        found[name] = {"peer": bench.PEER, "rows": rows}
        harness.print_table(f"{name} against {bench.PEER}", rows)
    return {"operators": found, "left_out": left_out}


def _cases(bench: Any, name: str, tiny: bool) -> Iterator[Case]:
    """Those in 16 bits, where there are such."""
    for case in bench.cases():
        if isinstance(case, Case) and (tiny or name == "image" or case.dtype != torch.float32):
            yield case


def _with_best_peer(case: Case, backend: str) -> Case:
    """The case against its peer compiled, if that is faster."""
    torch._dynamo.reset()  # all peers of a kind are one function to it
    compiled = torch.compile(case.peer, dynamic=False, backend=backend)
    contest = harness.measure(replace(case, ours=compiled))
    return replace(case, peer=compiled) if contest.ours < contest.peer else case
