"""What is measured on a GPU: models with random weights in the shapes of well-known ones."""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import LlamaConfig, MllamaConfig

from benchmarks.models.engines import MLLAMA, TRANSFORMERS, Engine
from benchmarks.models.files import LLAMA_1B, TINY, TINY_TILED, VISION_11B
from benchmarks.models.groups import Case, Contender, Group
from benchmarks.models.random_folder import write_processor

LLAMA_8B: dict[str, Any] = LLAMA_1B | {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "head_dim": 128,
    "rope_parameters": LLAMA_1B["rope_parameters"] | {"factor": 8.0},
    "tie_word_embeddings": False,
}
MLLAMA_LORA = Engine("mllama", "mllama_lora")
TRANSFORMERS_LORA = Engine("transformers", "transformers_lora")


class Configs:
    """Folders with a config.json alone: workers make random weights on their device.

    Args:
        folder: where they are written.
        tiny: the smallest models, for a smoke run.
    """

    def __init__(self, folder: Path, tiny: bool):
        self._folder, self._tiny = folder, tiny

    def llama_1b(self) -> Path:
        return self._llama("1b", LLAMA_1B)

    def llama_8b(self) -> Path:
        return self._llama("8b", LLAMA_8B)

    def vision_11b(self) -> Path:
        """With the processor's files."""
        config, path = MllamaConfig(**TINY_TILED if self._tiny else VISION_11B), self._folder / "v"
        if not path.exists():
            config.save_pretrained(path)
            write_processor(config, path)
        return path

    def _llama(self, name: str, options: dict[str, Any]) -> Path:
        path = self._folder / name
        LlamaConfig(**TINY if self._tiny else options).save_pretrained(path)
        return path


File = Callable[[Configs], Path]
Cases = tuple[Case, ...]


@dataclass(frozen=True)
class Sizes:
    """Lengths in tokens, images' sides in pixels, and steps, of the cases."""

    decoded: int
    prompt: int
    trained: int
    steps: int
    sides: tuple[int, int]


FULL, TINIEST = Sizes(128, 4096, 2048, 4, (560, 1120)), Sizes(2, 8, 8, 1, (28, 56))


def groups(tiny: bool) -> dict[str, tuple[Group, ...]]:
    """By name, each contender as a group of its own: it is alone on the GPU, and has the cases that
    it can.

    Args:
        tiny: a smoke run, with some of the contenders.
    """
    sizes = TINIEST if tiny else FULL
    short = {"prompt": 16, "tokens": sizes.decoded}
    decode = Case("decode", "decode", short)
    static = Case(decode.name, "static", short)
    prefill = Case(f"prefill {sizes.prompt:,}", "prefill", {"tokens": sizes.prompt})
    photos = tuple(
        Case(f"file of {side} x {side}", "photo", {"side": side, "tokens": 2})
        for side in sizes.sides
    )
    tiles = tuple(
        Case(f"{count} tiles", "tiles", {"tiles": count, "tokens": 16}) for count in (1, 4)
    )
    steps = {"tokens": sizes.trained, "steps": sizes.steps}
    training = (Case(f"LoRA step, {sizes.trained:,} tokens", "steps", steps),)

    def plain(engine: Engine, file: File) -> Contender:
        kind = "f32" if tiny else "bf16"
        return Contender(engine, kind, kind, file)

    def models(name: str, model: str, file: File, ours: Cases, theirs: Cases) -> tuple[Group, ...]:
        formats = {"int4": "int4"}
        if not tiny:
            formats |= {"bf16": "bf16", "int8": "int8", "bf16, not packed": "dense"}
        contenders = [(Contender(MLLAMA, *form, file), ours) for form in formats.items()]
        contenders.append((plain(TRANSFORMERS, file), theirs))
        return tuple(Group(name, model, "", (one,), cases, alone=True) for one, cases in contenders)

    def adapted(name: str, model: str, file: File) -> tuple[Group, ...]:
        contenders = [plain(MLLAMA_LORA, file), plain(TRANSFORMERS_LORA, file)]
        if importlib.util.find_spec("liger_kernel") and not tiny:
            contenders.append(Contender(TRANSFORMERS_LORA, "bf16, Liger", "liger", file))
        return tuple(Group(name, model, "", (one,), training, alone=True) for one in contenders)

    texts, images = ((decode, prefill), (static, prefill)), ((decode, *photos, *tiles), tiles)
    one = "Llama-3.2-1B's shapes", Configs.llama_1b
    eight = "Llama-3.1-8B's shapes", Configs.llama_8b
    vision = "Llama-3.2-11B-Vision's shapes", Configs.vision_11b
    found = (
        models("1b", *one, *texts),
        adapted("lora-1b", *one),
        models("11b", *vision, *images),
        *(() if tiny else (models("8b", *eight, *texts), adapted("lora-8b", *eight))),
    )
    return {contenders[0].name: contenders for contenders in found}
