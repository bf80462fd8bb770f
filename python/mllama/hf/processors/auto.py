"""Loads the processor of any model folder as transformers' classes; writes it beside a model."""

import os
import sys
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from mllama.checkpoints.files import write_folder
from mllama.hf.processors.folders import load_tokenizer
from mllama.hf.processors.llava import MllamaImageProcessor
from mllama.hf.processors.paligemma import PaliGemmaProcessor
from mllama.hf.processors.square import SquareImageProcessor
from mllama.hf.processors.tiled import TiledProcessor
from mllama.hf.processors.tokenizers import load_gguf_tokenizer, load_meta_processor
from mllama.processing.auto import load_any, processor_kind
from mllama.processing.folders import PROCESSOR_FILES

_CLASSES: dict[str, Any] = {
    "merged": MllamaImageProcessor,
    "tiled": TiledProcessor,
    "paligemma": PaliGemmaProcessor,
    "images": SquareImageProcessor,
}


def load_processor(
    path: str | os.PathLike,
) -> ProcessorMixin | SquareImageProcessor | PreTrainedTokenizerBase:
    """Load the processor of a model.

    Args:
        path: a model folder, or a .gguf file.

    Returns:
        The processor, the image processor of a SigLIP alone, or a text model's tokenizer, chosen
        as by `mllama.processing.auto.load_preprocessor`.

    Raises:
        TypeError: path is not a path.
        FileNotFoundError: the folder or one of its files does not exist.
        ValueError: files cannot be read, or the processor is not supported; the message names it.
    """
    return load_any(path, _load_folder, load_gguf_tokenizer, load_meta_processor)


def _load_folder(folder: Path) -> Any:
    kind = processor_kind(folder)
    return load_tokenizer(folder) if kind is None else _CLASSES[kind].from_pretrained(folder)


def processor_to_write(path: Path) -> Any:
    """The processor to write with a model; None, said on stderr, if the model's files have none."""
    try:
        return load_processor(path)
    except FileNotFoundError as error:
        print(f"mllama: no tokenizer or processor is written: {error}", file=sys.stderr)
        return None


def write_both(folder: Path, model: PreTrainedModel, processor: Any) -> None:
    """Write a model and its processor, if it has one, to a folder, atomically."""

    def write(aside: Path) -> None:
        model.save_pretrained(aside)
        if processor is not None:
            processor.save_pretrained(aside)

    write_folder(folder, write, () if processor is None else PROCESSOR_FILES)
