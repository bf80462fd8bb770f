"""PyTorch's own products of a row with each weight of a model, and nothing else: no engine on
these kernels decodes faster. `model` is a folder (its config.json), `weights` is "bf16", "int8" or
"int4" (in groups of 32).
"""

import json
import time
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import torch
from serve import serve


def products(config: dict) -> list[tuple[int, int]]:
    """(out, in) of each weight that a token of a Llama reads."""
    hidden, wide = config["hidden_size"], config["intermediate_size"]
    kv = hidden // config["num_attention_heads"] * config["num_key_value_heads"]
    layer = [(hidden, hidden), (kv, hidden), (kv, hidden), (hidden, hidden)]
    layer += [(wide, hidden), (wide, hidden), (hidden, wide)]
    return layer * config["num_hidden_layers"] + [(config["vocab_size"], hidden)]


def _bf16(rows: int, columns: int) -> tuple[Callable, int]:
    weight = torch.empty(rows, columns, dtype=torch.bfloat16).fill_(0.01)
    return lambda x: torch.mm(x, weight.T), weight.nbytes


def _int8(rows: int, columns: int) -> tuple[Callable, int]:
    weight = torch.ones(rows, columns, dtype=torch.int8)
    scales = torch.full((rows,), 0.01, dtype=torch.bfloat16)
    return lambda x: torch._weight_int8pack_mm(x, weight, scales), weight.nbytes


def _int4(rows: int, columns: int) -> tuple[Callable, int]:
    codes = torch.ones(rows, columns, dtype=torch.int32)
    weight = torch._convert_weight_to_int4pack_for_cpu(codes, 1)
    scales = torch.full((columns // 32, rows, 2), 0.01, dtype=torch.bfloat16)
    size = weight.nbytes + scales.nbytes
    return lambda x: torch._weight_int4pack_mm_for_cpu(x, weight, 32, scales), size


def load(arguments: Namespace) -> tuple[dict, dict]:
    torch.set_num_threads(arguments.threads)
    config = json.loads((Path(arguments.model) / "config.json").read_text())
    make = {"bf16": _bf16, "int8": _int8, "int4": _int4}[arguments.weights]
    shapes = products(config)
    calls, sizes = zip(*(make(*shape) for shape in shapes), strict=True)

    @torch.inference_mode()
    def batch(prompt: int, tokens: int, rows: int) -> dict:
        inputs = [torch.ones(rows, columns, dtype=torch.bfloat16) for _, columns in shapes]
        start = time.perf_counter()
        for _ in range(tokens):
            for call, x in zip(calls, inputs, strict=True):
                call(x)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "tokens": tokens * rows, "bytes": sum(sizes) * tokens}

    def decode(prompt: int, tokens: int) -> dict:
        return batch(prompt, tokens, 1)

    return {"version": torch.__version__}, {"decode": decode, "batch": batch}


if __name__ == "__main__":
    serve(load)
