"""Reads the settings files of a folder's processor."""

import json
import os
from collections.abc import Callable
from pathlib import Path

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "spiece.model",
    "vocab.json",
)  # every tokenizer has one of these
# All files of processors and tokenizers. Stale ones left next to another processor's would be read
# as its own.
PROCESSOR_FILES = (
    *TOKENIZER_FILES,
    "added_tokens.json",
    "additional_chat_templates",  # a folder
    "chat_template.jinja",
    "chat_template.json",
    "merges.txt",
    "preprocessor_config.json",
    "processor_config.json",
    "special_tokens_map.json",
    "tokenizer_config.json",
)


def read_object(where: str | os.PathLike, name: str) -> dict:
    """The JSON object in a file of a folder; empty if there is no such file.

    Raises:
        ValueError: the file is not a JSON object.
    """
    file = Path(where, name)
    return parse_object(file, f"{where}: {name}") if file.exists() else {}


def parse_object(file: str | os.PathLike, name: str) -> dict:
    """The JSON object in a file.

    Raises:
        ValueError: it is not a JSON object; the message begins with name.
    """
    try:
        content = json.loads(Path(file).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{name} is no JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name} must be a JSON object, got {type(content).__name__}")
    return content


def read_settings(
    where: str | os.PathLike, read: Callable[..., dict] = read_object
) -> tuple[dict, dict]:
    """The settings of a folder's processor and of its image processor.

    The first is processor_config.json, with the template of an older chat_template.json, empty if
    there is neither (tokenizers read chat_template.jinja). The second is its "image_processor", or
    preprocessor_config.json.

    Args:
        read: reads the JSON object in a file, as `read_object`; may find it on the hub.

    Raises:
        FileNotFoundError: there is no image processor's file.
        ValueError: a file is not a JSON object.
    """
    processor = read(where, "processor_config.json")
    older = read(where, "chat_template.json")
    if "chat_template" in older:
        processor = {"chat_template": older["chat_template"], **processor}
    images = processor.get("image_processor") or read(where, "preprocessor_config.json")
    if not images:
        raise FileNotFoundError(
            f"{where} holds no preprocessor_config.json, and no image processor in a"
            " processor_config.json"
        )
    if not isinstance(images, dict):
        raise ValueError(
            f"{where}: image_processor in processor_config.json must be a JSON object,"
            f" got {type(images).__name__}"
        )
    return processor, images
