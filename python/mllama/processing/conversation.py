"""Encodes conversations, with this package's or transformers' processors and tokenizers."""

from collections.abc import Mapping, Sequence
from typing import Any

from mllama.processing.image import download_urls
from mllama.processing.messages import IMAGE_KEYS, as_messages, as_parts, as_text
from mllama.processing.preprocessors import Preprocessor
from mllama.processing.template import render
from mllama.processing.text_tokenizer import pad_rows


def encode_messages(
    processor: Any, messages: Sequence[Mapping], images: Sequence = (), allow_urls: bool = False
) -> Any:
    """Encode a conversation for the model to continue, as a batch of one row.

    Uses the chat template of the processor or tokenizer. Without one, a single user message is
    written in the family's plain format: images, BOS, text (for PaliGemma and LLaVA also a
    newline).

    Args:
        processor: as returned by `load_preprocessor` or `mllama.load_processor`: a processor with
            images, or a tokenizer, which takes none.
        messages: {"role": ..., "content": ...}. content is a str, None (an assistant's that only
            calls tools) or a list of parts {"type": "text", "text": ...} and {"type": "image"}. An
            image part may have its image as "image", "path", "url" or "base64", in any form that
            `load_image` accepts; or be OpenAI's {"type": "image_url", "image_url": {"url": ...}}.
        images: images for the image parts without one, in order. If neither a part nor a
            placeholder in a text asks for an image, they are placed at the start of the first
            user message.
        allow_urls: download images given as http(s) URLs.

    Returns:
        A dict of tensors; a BatchFeature for a processor of transformers.

    Raises:
        TypeError: a processor, message or content has the wrong type.
        ValueError: there are no messages; a message has no role; a part is neither text nor image;
            the numbers of images and of places for them differ, or the model takes none; the chat
            template fails or is missing; `load_image` rejects an image.
        FileNotFoundError: an image file does not exist.
    """
    return encode_batch(processor, [messages], [images], allow_urls)


def encode_batch(
    processor: Any, conversations: Sequence, images: Sequence[Sequence], allow_urls: bool = False
) -> Any:
    """`encode_messages` for several conversations with their images: a batch, padded on the left.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `encode_messages`.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    image_token = image_token_of(processor)
    if not hasattr(tokenizer, "special_tokens_map") or not hasattr(processor, "chat_template"):
        raise TypeError(
            f"processor must be a processor or a tokenizer, got {type(processor).__name__}"
        )
    written = [
        _write(processor, image_token, messages, own, allow_urls)
        for messages, own in zip(conversations, images, strict=True)
    ]
    texts, rows = [text for text, _ in written], [own for _, own in written]
    return _encode(processor, texts, rows, processor.chat_template is not None)


def encode_raw(processor: Any, prompt: str, images: Sequence = ()) -> Any:
    """A prompt as it is, without the chat template; otherwise as `encode_messages`.

    Raises:
        ValueError: the model takes no images.
    """
    if images and image_token_of(processor) is None:
        raise ValueError(f"this model takes no images, got {len(images)}")
    return _encode(processor, [prompt], [images], by_template=False)


def image_token_of(processor: Any) -> str | None:
    """The placeholder of images; None for a tokenizer, which takes none."""
    tokenizer = getattr(processor, "tokenizer", processor)
    return None if tokenizer is processor else getattr(processor, "image_token", None)


def _encode(processor: Any, texts: list[str], rows: Sequence[Sequence], by_template: bool) -> Any:
    """Texts with their images as a batch; only those of no template get special tokens."""
    if image_token_of(processor) is None:
        tokenizer = getattr(processor, "tokenizer", processor)
        return pad_rows(
            [tokenizer.encode(text, add_special_tokens=not by_template) for text in texts]
        )
    given = rows if any(rows) else None
    if isinstance(processor, Preprocessor):
        return processor(texts, given, as_is=by_template)
    options: dict[str, Any] = {"padding": True, "padding_side": "left"} if len(texts) > 1 else {}
    if by_template and getattr(processor, "takes_as_is", False):
        options["as_is"] = True
    return processor(text=texts, images=given, return_tensors="pt", **options)


def _write(
    processor: Any,
    image_token: str | None,
    messages: Sequence[Mapping],
    images: Sequence,
    allow_urls: bool,
) -> tuple[str, list]:
    """A conversation's prompt, and its images in the order of their places."""
    if not isinstance(images, (list, tuple)):
        raise TypeError(f"images must be a list, got {type(images).__name__}")
    turns = [_in_parts(message) for message in as_messages(messages)]
    placed: list = download_urls(_place(turns, list(images), image_token), allow_urls)
    if placed and image_token is None:
        raise ValueError(f"this model takes no images, got {len(placed)}")
    template = processor.chat_template
    if template is None:
        if len(turns) > 1:
            raise ValueError(
                f"the processor has no chat template: give one message, not {len(turns)}"
            )
        return _plain_text(processor, as_text(turns[0]["content"], image_token), placed), placed
    if image_token is None or "image" not in str(template):  # a text model: contents are strings
        turns = [
            turn | {"content": as_text(turn["content"], image_token)}
            if isinstance(turn["content"], list)
            else turn
            for turn in turns
        ]
    tokenizer = getattr(processor, "tokenizer", processor)
    return render(template, tokenizer.special_tokens_map, turns), placed


def _in_parts(message: dict) -> dict:
    content = message["content"]
    return message if isinstance(content, Mapping) else message | {"content": as_parts(content)}


def _place(turns: list[dict], images: list, image_token: str | None) -> list:
    """All images in the order of their places. They are removed from the parts: templates do not
    read them.
    """
    parts = [
        part for turn in turns if isinstance(turn["content"], list) for part in turn["content"]
    ]
    written = image_token is not None and any(
        image_token in part["text"] for part in parts if part["type"] == "text"
    )
    if images and not written and not any(part["type"] == "image" for part in parts):
        first = next((turn for turn in turns if turn.get("role") == "user"), turns[0])
        first["content"][:0] = [{"type": "image"} for _ in images]
        return images
    rest, placed = iter(images), []
    for part in parts:
        if part["type"] == "image":
            own = [part.pop(key) for key in IMAGE_KEYS if part.get(key) is not None]
            if len(own) > 1:
                raise ValueError(f"an image part must bring one image, got {len(own)}")
            placed += own or [next(rest, None)]
        elif written:
            placed += [next(rest, None) for _ in range(part["text"].count(image_token))]
    missing, left = sum(image is None for image in placed), len(list(rest))
    if missing or left:
        raise ValueError(
            f"the messages have places for {len(placed)} image(s), but"
            f" {len(placed) - missing + left} came"
        )
    return placed


def _plain_text(processor: Any, text: str, images: list) -> str:
    """A text with its placeholders for the family's plain format."""
    leading = (processor.image_token or "") * len(images) if images else ""
    if getattr(processor, "takes_as_is", False) and leading and text.startswith(leading):
        return text[len(leading) :]
    return text
