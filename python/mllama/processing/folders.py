"""Processors on disk: what a folder says, and writing one without leaving half a file."""

import os
import tempfile
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase
from transformers.image_processing_base import ImageProcessingMixin
from transformers.processing_utils import ProcessorMixin


def read_settings(where: str | os.PathLike, **kwargs) -> tuple[dict, dict]:
    """Return what a folder (or hub id) says of its processor and of its image processor.

    The first is processor_config.json, with the chat template, and empty where there is none; the second is its "image_processor", or
    preprocessor_config.json.

    Raises:
        OSError: there are no such files.
        ValueError: a file that is no JSON object.
    """
    try:
        processor, _ = ProcessorMixin.get_processor_dict(where, **kwargs)
        pictures, _ = ImageProcessingMixin.get_image_processor_dict(where, **kwargs)
    except (AttributeError, TypeError, UnicodeError, RecursionError) as error:  # from reading what is JSON, but no object
        raise ValueError(f"{where}: the processor's files cannot be read: {error}") from error
    for settings in (processor, pictures):
        if not isinstance(settings, dict):
            raise ValueError(f"{where}: the processor's files must hold JSON objects, got {type(settings).__name__}")
    return processor, pictures


def load_tokenizer(where: str | os.PathLike, **kwargs) -> PreTrainedTokenizerBase:
    """Read a folder's (or hub id's) tokenizer; code that comes with it is not run unless kwargs say trust_remote_code.

    Raises:
        OSError: there are no such files.
    """
    return AutoTokenizer.from_pretrained(where, **{"trust_remote_code": False, **kwargs})


def save_aside(processor: ProcessorMixin, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs) -> list[str]:
    """Save a processor of transformers; each file is written aside and renamed. Returns their paths."""
    if push_to_hub:
        return processor.save_pretrained(save_directory, push_to_hub=True, **kwargs)
    folder = Path(save_directory)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    with tempfile.TemporaryDirectory(prefix=".processor-", dir=folder) as aside:
        processor.save_pretrained(aside, **kwargs)
        for file in sorted(path for path in Path(aside).rglob("*") if path.is_file()):
            target = folder / file.relative_to(aside)
            target.parent.mkdir(exist_ok=True)
            os.replace(file, target)
            written.append(str(target))
    return written
