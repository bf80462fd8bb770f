"""Image encoders alone, and prompts with an image."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PaliGemmaConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from benchmarks.models.engines import (
    MLLAMA,
    MLLAMA_SIGLIP,
    ONNXRUNTIME_SIGLIP,
    TRANSFORMERS,
    TRANSFORMERS_SIGLIP,
    Engine,
)
from benchmarks.models.files import Files, run
from benchmarks.models.groups import Case, Contender, Group
from benchmarks.models.random_folder import write_random
from benchmarks.models.worker import PEERS
from mllama.checkpoints.files import write_folder

SIGLIP_BASE: dict[str, Any] = {"image_size": 224, "patch_size": 16}
PALIGEMMA_3B: dict[str, Any] = {
    "vision_config": {
        "model_type": "siglip_vision_model",
        "hidden_size": 1152,
        "intermediate_size": 4304,
        "num_hidden_layers": 27,
        "num_attention_heads": 16,
        "image_size": 224,
        "patch_size": 14,
    },
    "text_config": {
        "model_type": "gemma",
        "hidden_size": 2048,
        "intermediate_size": 16384,
        "num_hidden_layers": 18,
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "vocab_size": 257216,
    },
    "projection_dim": 2048,
    "image_token_index": 257152,
}
IMAGES = (
    Case("images/s, one by one", "encode", {"images": 1}),
    Case("images/s, eight at a time", "encode", {"images": 8}),
)
PROMPT = (Case("prefill of an image and 16 tokens", "see", {"tokens": 16}),)


def _siglip(files: Files) -> Path:
    def write(aside: Path) -> None:
        SiglipVisionModel(SiglipVisionConfig(**SIGLIP_BASE)).save_pretrained(aside)

    return files.make("siglip-base", lambda path: write_folder(path, write))


def _siglip_onnx(kind: str) -> Callable[[Files], Path | None]:
    def make(files: Files) -> Path | None:
        if (python := ONNXRUNTIME_SIGLIP.python) is None:
            return None
        command = [python, PEERS / "export_siglip.py", _siglip(files)]
        return files.make(f"siglip-base-{kind}.onnx", lambda path: run(*command, path, kind))

    return make


def _paligemma(files: Files) -> Path:
    def write(aside: Path) -> None:
        write_random(PaliGemmaConfig(**PALIGEMMA_3B), aside)

    return files.make("paligemma-3b", lambda path: write_folder(path, write))


def _llava(files: Files) -> Path:
    def write(aside: Path) -> None:
        config = LlavaConfig(  # LLaVA-1.5-7B's shapes
            vision_config=CLIPVisionConfig(
                hidden_size=1024,
                intermediate_size=4096,
                num_hidden_layers=24,
                num_attention_heads=16,
                image_size=336,
                patch_size=14,
            ),
            text_config=LlamaConfig(vocab_size=32064),
            image_token_index=32000,
        )
        write_random(config, aside)

    return files.make("llava-7b", lambda path: write_folder(path, write))


def _siglip_group(bits: str, *peers: tuple[Engine, Callable[[Files], Path | None]]) -> Group:
    contenders = [Contender(engine, bits, bits, file) for engine, file in peers]
    ours = Contender(MLLAMA_SIGLIP, bits, bits, _siglip)
    return Group(f"siglip-{bits}", "SigLIP-base, 224 x 224", bits, (ours, *contenders), IMAGES)


def _prompt_group(name: str, model: str, bits: str, file: Callable[[Files], Path]) -> Group:
    """Beside transformers in bfloat16, which has no weights of fewer bits for a CPU."""
    contenders = Contender(MLLAMA, bits, bits, file), Contender(TRANSFORMERS, "bf16", "bf16", file)
    return Group(f"{name}-{bits}", model, bits, contenders, PROMPT, alone=True)


SIGLIP_GROUPS = (
    _siglip_group("f32", (TRANSFORMERS_SIGLIP, _siglip), (ONNXRUNTIME_SIGLIP, _siglip_onnx("f32"))),
    _siglip_group("bf16", (TRANSFORMERS_SIGLIP, _siglip)),
    _siglip_group("int8", (ONNXRUNTIME_SIGLIP, _siglip_onnx("int8"))),
)
# By themselves: their files take 6 and 14 GB.
PROMPT_GROUPS = (
    _prompt_group("paligemma", "PaliGemma-3B's shapes", "bf16", _paligemma),
    _prompt_group("paligemma", "PaliGemma-3B's shapes", "int4", _paligemma),
    _prompt_group("llava", "LLaVA-7B's shapes", "int4", _llava),
)
