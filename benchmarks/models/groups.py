"""What is measured: cases, the engines that compete in them, and the files that these read."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.models.engines import (
    LLAMA_BENCH,
    LLAMA_CPP,
    MLLAMA,
    ONNXRUNTIME,
    OPENVINO,
    TORCH,
    TRANSFORMERS,
    Engine,
)
from benchmarks.models.files import Files, packaged


@dataclass(frozen=True)
class Case:
    """One measurement: an action of the workers, and its arguments."""

    name: str
    action: str
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Contender:
    """An engine with a model in a format.

    Attributes:
        precision: the format's name, for people.
        weights: what the worker takes it as.
        file: makes the model's file; None where that is not possible here.
    """

    engine: Engine
    precision: str
    weights: str
    file: Callable[[Files], Path | None]


@dataclass(frozen=True)
class Group:
    """Contenders on one model, most with about as many bits per weight, measured in turn.

    Attributes:
        alone: memory holds one contender at a time, so that each has all its turns at once.
    """

    name: str
    model: str
    bits: str
    contenders: tuple[Contender, ...]
    cases: tuple[Case, ...]
    alone: bool = False


DECODE = Case("decode", "decode", {"prompt": 16, "tokens": 24})
BATCH = Case("decode, 8 sequences", "batch", {"prompt": 16, "tokens": 16, "rows": 8})
AFTER_8K = Case("decode after 8,192 tokens", "deep", {"depth": 8192, "tokens": 12})
AFTER_32K = Case("decode after 32,768 tokens", "deep", {"depth": 32768, "tokens": 8})
SMALLER = Case("the same, 8-bit cache", "deep_int8", {"depth": 32768, "tokens": 8})
PREFILL = Case("prefill 256", "prefill", {"tokens": 256})
PREFILL_2K = Case("prefill 2,048", "prefill", {"tokens": 2048})
ANSWER = Case("64 tokens after 64", "answer", {"prompt": 64, "tokens": 64})
GENERATE = Case("the same by `generate()`", "generate", {"prompt": 64, "tokens": 64})
LONGER = Case("decode", "decode", {"prompt": 64, "tokens": 96})

LLAMA, SMOLLM2 = "Llama-3.2-1B's shapes", "SmolLM2-135M"


def _gguf(kind: str) -> Callable[[Files], Path | None]:
    return lambda files: files.llama_gguf(kind)


def _onnx(kind: str) -> Callable[[Files], Path | None]:
    return lambda files: files.llama_onnx(kind)


def _small_gguf(kind: str) -> Callable[[Files], Path | None]:
    return lambda files: files.smollm2_gguf(kind)


def _small_onnx(kind: str) -> Callable[[Files], Path | None]:
    return lambda files: files.smollm2_onnx(kind)


def _llama_cpp(kind: str, file: Callable[[Files], Path | None]) -> tuple[Contender, ...]:
    return tuple(Contender(engine, kind, kind, file) for engine in (LLAMA_BENCH, LLAMA_CPP))


def _packaged(files: Files) -> Path | None:
    return packaged()


LLAMA_GROUPS = (
    Group(
        "1b-bf16",
        LLAMA,
        "bf16",
        (
            Contender(MLLAMA, "bf16", "bf16", Files.llama),
            *_llama_cpp("BF16", _gguf("bf16")),
            Contender(TRANSFORMERS, "bf16", "bf16", Files.llama),
            Contender(TORCH, "bf16", "bf16", Files.llama),
        ),
        (DECODE, AFTER_8K, PREFILL, PREFILL_2K),
    ),
    Group(
        "1b-int8",
        LLAMA,
        "int8",
        (
            Contender(MLLAMA, "int8", "int8", Files.llama),
            *_llama_cpp("Q8_0", _gguf("q8_0")),
            Contender(OPENVINO, "Q8_0", "q8_0", _gguf("q8_0")),
            Contender(TORCH, "int8", "int8", Files.llama),
        ),
        (DECODE, PREFILL, PREFILL_2K),
    ),
    Group(
        "1b-int4",
        LLAMA,
        "int4",
        (
            Contender(MLLAMA, "int4", "int4", Files.llama),
            Contender(MLLAMA, "the file's Q4_0", "file", _gguf("q4_0")),
            *_llama_cpp("Q4_0", _gguf("q4_0")),
            Contender(OPENVINO, "Q4_0", "q4_0", _gguf("q4_0")),
            Contender(ONNXRUNTIME, "int4", "int4", _onnx("int4")),
            Contender(TORCH, "int4", "int4", Files.llama),
        ),
        (DECODE, BATCH, AFTER_8K, AFTER_32K, SMALLER, PREFILL, PREFILL_2K),
    ),
    Group(
        "1b-f32",
        LLAMA,
        "f32",
        (
            Contender(MLLAMA, "f32", "f32", Files.llama),
            Contender(TRANSFORMERS, "f32", "f32", Files.llama),
        ),
        (DECODE, PREFILL, PREFILL_2K),
    ),
)
SMOLLM2_GROUPS = (
    Group(
        "smollm2-f32",
        SMOLLM2,
        "f32",
        (
            Contender(MLLAMA, "f32", "f32", Files.smollm2),
            Contender(TRANSFORMERS, "f32", "f32", Files.smollm2),
            Contender(ONNXRUNTIME, "f32", "f32", _small_onnx("f32")),
        ),
        (LONGER, PREFILL, PREFILL_2K, ANSWER, GENERATE),
    ),
    Group(
        "smollm2-bf16",
        SMOLLM2,
        "bf16",
        (
            Contender(MLLAMA, "bf16", "bf16", Files.smollm2),
            Contender(TRANSFORMERS, "bf16", "bf16", Files.smollm2),
            *_llama_cpp("BF16", _small_gguf("bf16")),
        ),
        (LONGER, PREFILL, PREFILL_2K, ANSWER, GENERATE),
    ),
    Group(
        "smollm2-int8",
        SMOLLM2,
        "int8",
        (
            Contender(MLLAMA, "int8", "int8", Files.smollm2),
            *_llama_cpp("Q8_0", _small_gguf("q8_0")),
            Contender(OPENVINO, "Q8_0", "q8_0", _small_gguf("q8_0")),
        ),
        (LONGER, PREFILL, PREFILL_2K, ANSWER, GENERATE),
    ),
    Group(
        "smollm2-int4",
        SMOLLM2,
        "int4",
        (
            Contender(MLLAMA, "int4", "int4", Files.smollm2),
            Contender(MLLAMA, "the file's Q4_1", "file", _packaged),
            *_llama_cpp("Q4_1", _packaged),
            *_llama_cpp("Q4_0", _small_gguf("q4_0")),
            Contender(OPENVINO, "Q4_1", "q4_1", _packaged),
            Contender(ONNXRUNTIME, "int4", "int4", _small_onnx("int4")),
        ),
        (LONGER, PREFILL, PREFILL_2K, ANSWER, GENERATE),
    ),
)
GROUPS = LLAMA_GROUPS + SMOLLM2_GROUPS

# A smoke run: our worker's every action on a tiny model.
QUICK = Group(
    "quick",
    "two layers of 128",
    "int4",
    (Contender(MLLAMA, "int4", "int4", Files.llama),),
    (
        Case("decode", "decode", {"prompt": 4, "tokens": 2}),
        Case("decode, 8 sequences", "batch", {"prompt": 4, "tokens": 2, "rows": 8}),
        Case("decode after 64 tokens", "deep", {"depth": 64, "tokens": 2}),
        Case("the same, 8-bit cache", "deep_int8", {"depth": 64, "tokens": 2}),
        Case("prefill 8", "prefill", {"tokens": 8}),
        Case("4 tokens after 4", "answer", {"prompt": 4, "tokens": 4}),
        Case("the same by `generate()`", "generate", {"prompt": 4, "tokens": 4}),
    ),
)
