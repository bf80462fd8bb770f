"""The processor of any model folder, and conversations to model inputs by any processor."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import pad
from transformers import PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from mllama.processing.chat import with_answers
from mllama.processing.folders import load_tokenizer, read_object, read_settings
from mllama.processing.image import download_urls
from mllama.processing.messages import IMAGE_KEYS, as_messages, as_parts, as_text
from mllama.processing.options import on_cpu
from mllama.processing.paligemma import PaliGemmaProcessor
from mllama.processing.processor import MllamaImageProcessor
from mllama.processing.square import SquareImageProcessor
from mllama.processing.template import render
from mllama.processing.tiled import TiledProcessor

_BY_CLASS = {
    "LlavaProcessor": MllamaImageProcessor,
    "MllamaProcessor": TiledProcessor,
    "PaliGemmaProcessor": PaliGemmaProcessor,
    "SiglipProcessor": SquareImageProcessor,
}
_BY_MODEL = {
    "llava": MllamaImageProcessor,
    "siglip_llama": MllamaImageProcessor,
    "mllama": TiledProcessor,
    "paligemma": PaliGemmaProcessor,
    "siglip": SquareImageProcessor,
    "siglip_vision_model": SquareImageProcessor,
}
_BY_PICTURES = {
    "MllamaImageProcessor": TiledProcessor,
    "SiglipImageProcessor": SquareImageProcessor,
}


def load_processor(
    path: str | os.PathLike,
) -> ProcessorMixin | SquareImageProcessor | PreTrainedTokenizerBase:
    """Return what a model needs before it: its processor, the image processor of a SigLIP alone, or
    a text model's tokenizer.

    The choice is by exact names: processor_class, then config.json's model_type, then
    image_processor_type; a folder without an image processor has a tokenizer. Meta's own folders
    (params.json) and GGUF files bring theirs in their own way.

    Args:
        path: a model folder, or a .gguf file.

    Raises:
        TypeError: path is no path.
        FileNotFoundError: no such folder, or a file missing in it.
        ValueError: files that cannot be read, or another family's processor, which the text names.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a str or a path, got {type(path).__name__}")
    folder = Path(path)
    if not folder.exists():
        raise FileNotFoundError(f"no such model: {folder}")
    if folder.is_file() or not (folder / "config.json").exists():
        if (folder / "params.json").exists():
            from mllama.processing.meta import load_meta_processor

            return load_meta_processor(folder)
        files = [folder] if folder.is_file() else list(folder.glob("*.gguf"))
        if len(files) == 1 and files[0].suffix == ".gguf":
            from mllama.checkpoints.gguf.tokenizer import load_tokenizer as load_gguf_tokenizer

            return with_answers(load_gguf_tokenizer(files[0]))
    try:
        kind = _processor_class(folder)
        if kind is not None:
            return kind.from_pretrained(folder)
        return load_tokenizer(folder)
    except (ValueError, FileNotFoundError):
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"{folder} lacks a processor's or tokenizer's files: {error}"
        ) from error
    except Exception as error:  # a broken tokenizer.json raises nothing more definite
        raise ValueError(f"{folder}: the processor cannot be read: {error}") from error


def encode_messages(
    processor: Any, messages: Sequence[Mapping], pictures: Sequence = (), allow_urls: bool = False
) -> BatchFeature:
    """Return a model's inputs for a conversation that the model is to continue: one row, as torch
    tensors.

    Written by the chat template of the processor or tokenizer. Without one, a single message from
    the user is laid out as the family does
    it: pictures, BOS, text (and for PaliGemma and LLaVA a newline).

    Args:
        processor: as `load_processor` returns it: a processor, or a tokenizer, which takes no
            pictures.
        messages: {"role": ..., "content": ...}, content a str, None (an assistant's that only calls
            tools) or a list of parts {"type": "text", "text": ...} and {"type": "image"}, which may
            bring its picture as "image", "path", "url" or "base64", each of which takes what
            `load_picture` takes; or OpenAI's {"type": "image_url", "image_url": {"url": ...}}.
        pictures: for the image parts that bring none, in order. Where no part and no placeholder
            written in a text asks for a picture, they come first in the first message of the user.
        allow_urls: download images given as http(s) URLs.

    Raises:
        TypeError: a processor, message or content of another type.
        ValueError: no messages; a message without a role; a part that is neither text nor image;
            pictures and places for them differ in number, or the model takes none; a chat template
            that fails or is missing; a picture that `load_picture` refuses.
        FileNotFoundError: no such picture.
    """
    return encode_batch(processor, [messages], [pictures], allow_urls)


@on_cpu
def encode_batch(
    processor: Any, conversations: Sequence, pictures: Sequence[Sequence], allow_urls: bool = False
) -> BatchFeature:
    """`encode_messages` of several conversations, each with pictures of its own: rows of one batch,
    padded on the left.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `encode_messages`.
    """
    image_token = (
        getattr(processor, "image_token", None) if isinstance(processor, ProcessorMixin) else None
    )
    if image_token is None and not hasattr(processor, "apply_chat_template"):
        raise TypeError(
            f"processor must be a processor or a tokenizer, got {type(processor).__name__}"
        )
    written = [
        _write(processor, image_token, messages, own, allow_urls)
        for messages, own in zip(conversations, pictures, strict=True)
    ]
    texts, rows = [text for text, _ in written], [own for _, own in written]
    if image_token is None:
        options: dict[str, Any] = {
            "return_token_type_ids": False,
            "add_special_tokens": processor.chat_template is None,
        }
        return _pad_left([processor(text, return_tensors="pt", **options) for text in texts])
    options = {"padding": True, "padding_side": "left"} if len(texts) > 1 else {}
    if processor.chat_template is not None and isinstance(processor, MllamaImageProcessor):
        options["as_is"] = True
    return processor(text=texts, images=rows if any(rows) else None, return_tensors="pt", **options)


def _write(
    processor: Any,
    image_token: str | None,
    messages: Sequence[Mapping],
    pictures: Sequence,
    allow_urls: bool,
) -> tuple[str, list]:
    """A conversation's prompt, and its pictures in the order of their places."""
    if not isinstance(pictures, (list, tuple)):
        raise TypeError(f"pictures must be a list, got {type(pictures).__name__}")
    turns = [_in_parts(message) for message in as_messages(messages)]
    placed: list = download_urls(_place(turns, list(pictures), image_token), allow_urls)
    if placed and image_token is None:
        raise ValueError(f"this model takes no pictures, got {len(placed)}")
    template = processor.chat_template
    if template is None:
        if len(turns) > 1:
            raise ValueError(
                f"the processor has no chat template: give one message, not {len(turns)}"
            )
        return _plain_text(processor, as_text(turns[0]["content"], image_token), placed), placed
    if image_token is None or "image" not in str(
        template
    ):  # a template for text: contents are strings
        turns = [
            turn | {"content": as_text(turn["content"], image_token)}
            if isinstance(turn["content"], list)
            else turn
            for turn in turns
        ]
    return render(processor, turns), placed


def _processor_class(folder: Path) -> Any:
    """The class that reads a folder's processor; None for a tokenizer alone."""
    settings: dict[str, Any] = {}
    pictures: dict[str, Any] = {}
    if any(
        (folder / name).exists() for name in ("processor_config.json", "preprocessor_config.json")
    ):
        settings, pictures = read_settings(folder)
    name = settings.get("processor_class") or pictures.get("processor_class")
    if name:
        name = str(name)
        if name not in _BY_CLASS:
            raise ValueError(f"{folder} holds a {name}; what is read is {', '.join(_BY_CLASS)}")
        return _BY_CLASS[name]
    model_type = read_object(folder, "config.json").get("model_type")
    if isinstance(model_type, str) and model_type in _BY_MODEL:
        return _BY_MODEL[model_type]
    if not pictures:
        return None
    kind = str(pictures.get("image_processor_type")).removesuffix("Fast")
    if kind not in _BY_PICTURES:
        raise ValueError(
            f"{folder} holds a {kind} and says of no model whose it is; what is read alone is {', '.join(_BY_PICTURES)}"
        )
    return _BY_PICTURES[kind]


def _in_parts(message: dict) -> dict:
    content = message["content"]
    return message if isinstance(content, Mapping) else message | {"content": as_parts(content)}


def _place(turns: list[dict], pictures: list, image_token: str | None) -> list:
    """All pictures in the order of their places; the parts keep none, since no template needs to
    see them.
    """
    parts = [
        part for turn in turns if isinstance(turn["content"], list) for part in turn["content"]
    ]
    written = image_token is not None and any(
        image_token in part["text"] for part in parts if part["type"] == "text"
    )
    if pictures and not written and not any(part["type"] == "image" for part in parts):
        first = next((turn for turn in turns if turn.get("role") == "user"), turns[0])
        first["content"][:0] = [{"type": "image"} for _ in pictures]
        return pictures
    rest, placed = iter(pictures), []
    for part in parts:
        if part["type"] == "image":
            own = [part.pop(key) for key in IMAGE_KEYS if part.get(key) is not None]
            if len(own) > 1:
                raise ValueError(f"an image part must bring one picture, got {len(own)}")
            placed += own or [next(rest, None)]
        elif written:
            placed += [next(rest, None) for _ in range(part["text"].count(image_token))]
    missing, left = sum(picture is None for picture in placed), len(list(rest))
    if missing or left:
        raise ValueError(
            f"the messages have places for {len(placed)} picture(s), but {len(placed) - missing + left} came"
        )
    return placed


def _plain_text(processor: Any, text: str, pictures: list) -> str:
    """What the family's own layout is made of."""
    if (
        isinstance(processor, MllamaImageProcessor)
        and pictures
        and text.startswith(processor.image_token * len(pictures))
    ):
        return text[
            len(processor.image_token) * len(pictures) :
        ]  # unwritten, they get BOS and a newline around the text
    return text


def _pad_left(rows: list[BatchFeature]) -> BatchFeature:
    """A batch of a tokenizer's rows; not by the tokenizer, since many of text models have no
    padding token.
    """
    if len(rows) == 1:
        return rows[0]
    longest = max(row["input_ids"].shape[1] for row in rows)
    names = ("input_ids", "attention_mask")
    return BatchFeature(
        {
            name: torch.cat([pad(row[name], (longest - row[name].shape[1], 0)) for row in rows])
            for name in names
        }
    )
