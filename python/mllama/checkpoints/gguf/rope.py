"""Rotary frequencies in GGUF files. Llama 3's scaling is stored as a tensor of factors."""

import math
from typing import Any

import torch

from mllama.checkpoints.gguf.header import GgufHeader
from mllama.checkpoints.sources import Source
from mllama.config.checks import check_size

ROPE_FREQS = "rope_freqs.weight"
# Values of Meta's Llama 3 files of every size; only the factor differs.
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL_CONTEXT = 8192


def read_rope(
    header: GgufHeader, architecture: str, source: Source, head_dim: int
) -> dict[str, Any]:
    base = header.get(f"{architecture}.rope.freq_base", float, 10000.0)
    kind = header.get(f"{architecture}.rope.scaling.type", str, "none")
    older = f"{architecture}.rope.scale_linear"  # in files of 2023
    if kind not in ("none", "linear"):
        raise ValueError(
            f"{header.path}: {architecture}.rope.scaling.type {kind[:50]!r} is not read; "
            "'none' "
            "and 'linear' are"
        )
    factor = header.get(
        f"{architecture}.rope.scaling.factor" if kind == "linear" else older, float, 1.0
    )
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": base}
    if factor not in (0.0, 1.0):
        parameters |= {"rope_type": "linear", "factor": factor}
    if ROPE_FREQS in header.tensors:
        name = f"{architecture}.rope.scaling.original_context_length"
        original = header.get(name, int, ORIGINAL_CONTEXT)
        check_size(str(header.path), name, original)
        scaling = _llama3(header, source, base, head_dim, original)
        if scaling and parameters["rope_type"] != "default":
            raise ValueError(
                f"{header.path}: the rotary frequencies are scaled twice, by {ROPE_FREQS} and by a "
                "linear factor"
            )
        parameters |= scaling
    return parameters


def _llama3(
    header: GgufHeader, source: Source, base: float, head_dim: int, original: int
) -> dict[str, Any]:
    """The parameters behind rope_freqs.weight; empty if it scales nothing."""
    shape = source.headers()[ROPE_FREQS].shape
    if shape != (head_dim // 2,):
        raise ValueError(
            f"{header.path}: {ROPE_FREQS} must have {head_dim // 2} factors, one for each rotary "
            f"pair, got {list(shape)}"
        )
    parameters = llama3_parameters(source.read(ROPE_FREQS), head_dim, base, original)
    if parameters is None:
        constants = ", ".join(f"{name} {value}" for name, value in LLAMA3.items())
        raise ValueError(
            f"{header.path}: {ROPE_FREQS} is no scaling of Llama 3 with {constants}, an original "
            f"context of {original} tokens and one factor; "
            "others are not read"
        )
    return parameters


def llama3_parameters(
    factors: torch.Tensor, head_dim: int, base: float, original: int
) -> dict[str, Any] | None:
    """The parameters of Llama 3's scaling that give these factors; empty if they scale nothing,
    None for another scaling.
    """
    stored = factors.double()
    if bool((stored == 1).all()):
        return {}
    factor = round(float(stored[-1]), 4)  # the slowest pair has the full factor
    parameters = {
        "rope_type": "llama3",
        "factor": factor,
        "original_max_position_embeddings": original,
    } | LLAMA3
    known = factor > 1 and torch.allclose(
        stored, rope_factors(head_dim, base, parameters), rtol=1e-4
    )
    return parameters if known else None


def rope_factors(head_dim: int, base: float, parameters: dict[str, Any]) -> torch.Tensor:
    """Divisors of the rotary frequencies in Llama 3's scaling: float64 [head_dim / 2]. Formula of
    transformers' `rope_type` "llama3".
    """
    factor, low, high = (
        parameters[name] for name in ("factor", "low_freq_factor", "high_freq_factor")
    )
    frequencies = base ** (
        -torch.arange(0, head_dim, 2, dtype=torch.float64, device="cpu") / head_dim
    )
    turns = parameters["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return 1 / ((1 - keep) / factor + keep)
