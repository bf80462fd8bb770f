"""Checks questions about images and encodes them to a model's inputs."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from mllama.assets import EMBEDDED
from mllama.processing.conversation import encode_batch, encode_messages
from mllama.processing.image import download_urls, is_image, load_image, once_each
from mllama.processing.image_source import names_image


def tokenizer_of(processor: Any) -> Any:
    """A processor's tokenizer, or the tokenizer itself."""
    return getattr(processor, "tokenizer", processor)


def check_same_tokenizer(processor: Any, other: Any) -> None:
    """Reject a draft model's processor whose ids are others.

    Raises:
        ValueError: a text has other ids.
    """
    text = "The 3 naïve café-goers said:\n\tprint('hello')  # 東京, 2026"
    ids, others = (tokenizer_of(one).encode(text) for one in (processor, other))
    if ids != others:
        raise ValueError("draft_model must have the model's own tokenizer: its ids are others")


def refuse_swapped(image: Any, question: Any) -> None:
    """Reject `ask(question, image)`, and a question that is not text.

    Raises:
        TypeError: the question is not text.
        ValueError: image and question are swapped.
    """
    shown = image if isinstance(image, (list, tuple)) else [image]
    is_words = bool(shown) and all(
        isinstance(text, str) and not names_image(text) for text in shown
    )
    if is_words and (is_image(question) or (isinstance(question, str) and names_image(question))):
        raise ValueError("image and question are swapped: the image comes first")
    if isinstance(question, str):
        return
    if not isinstance(question, (list, tuple)) or not all(isinstance(one, str) for one in question):
        raise TypeError(
            f"the question must be a str, got {type(question).__name__} (to ask several, a list of "
            "str)"
        )
    if not question:
        raise ValueError("the question is an empty list")


def as_list(image: Any) -> list:
    """The images of one question."""
    if image is None:
        return []
    if isinstance(image, (list, tuple)) or getattr(image, "ndim", 3) == 4:
        return list(image)
    return [image]


def share_images(image: Any, questions: int) -> list[list]:
    """The images of each question: one image for all, or one list entry per question.

    Raises:
        ValueError: the list has the wrong length.
    """
    if not isinstance(image, (list, tuple)):
        # A stream can be read only once.
        row = [load_image(one) if hasattr(one, "read") else one for one in as_list(image)]
        return [row] * questions
    if len(image) != questions:
        raise ValueError(
            f"image is a list of {len(image)} for {questions} questions: give one image for all, "
            "or one entry for each"
        )
    return [as_list(entry) for entry in image]


def encode(
    processor: Any,
    image: Any,
    question: str,
    turns: Sequence[tuple[str, str]] = (),
    system: str | None = None,
    allow_urls: bool = False,
) -> Mapping[str, torch.Tensor]:
    """The model's inputs for a question about an image, a list of images or None, after earlier
    turns of (question, answer).

    Uses the processor's chat template; without one, the family's plain format, which supports no
    turns and no system prompt.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `mllama.ask`.
    """
    return encode_questions(processor, [as_list(image)], [question], turns, system, allow_urls)


def encode_questions(
    processor: Any,
    images: Sequence[Sequence],
    questions: Sequence[str],
    turns: Sequence[tuple[str, str]] = (),
    system: str | None = None,
    allow_urls: bool = False,
) -> Mapping[str, torch.Tensor]:
    """`encode` for a batch: the images of each question, and the questions."""
    image_token = getattr(processor, "image_token", None)
    conversations = []
    for question in questions:
        check_question(question)
        if image_token and image_token in question:
            raise ValueError(
                f"the question must not contain {image_token!r}, which stands for the image in a "
                "prompt"
            )
        texts = [*(text for turn in turns for text in turn), question]
        messages = [] if system is None else [{"role": "system", "content": system}]
        messages += as_messages(texts)
        conversations.append(messages)
    if system is not None:
        check_system(processor, system)
    rows = once_each(
        lambda row: [load_image(image) for image in download_urls(list(row), allow_urls)], images
    )
    return encode_batch(processor, conversations, rows)


def as_messages(texts: Sequence[str]) -> list[dict[str, str]]:
    """Alternating user and assistant messages."""
    return [
        {"role": "assistant" if index % 2 else "user", "content": text}
        for index, text in enumerate(texts)
    ]


def check_system(processor: Any, system: str) -> None:
    """Reject a system prompt that would not reach the model.

    Raises:
        ValueError: it is empty or contains the image placeholder; there is no chat template, or
            the template drops or rejects system prompts.
    """
    if not system.strip():
        raise ValueError("the system prompt is empty")
    if (image_token := getattr(processor, "image_token", None)) and image_token in system:
        raise ValueError(
            f"the system prompt must not contain {image_token!r}, which stands for the image in a "
            "prompt"
        )
    if processor.chat_template is None:
        raise ValueError("this model has no chat template, and so no place for a system prompt")
    user = {"role": "user", "content": "?"}
    without, *both = (
        encode_messages(
            processor, [*({"role": "system", "content": text} for text in texts), user]
        )["input_ids"].tolist()
        for texts in ([], ["a"], ["b"])
    )
    if both[0] == both[1] or without in both:
        raise ValueError("this model's chat template leaves system prompts out")


def check_question(question: Any) -> None:
    """Reject what no processor accepts as a question.

    Raises:
        TypeError: not a str.
        ValueError: empty, or with surrogates (undecodable bytes).
    """
    if not isinstance(question, str):
        raise TypeError(f"the question must be a str, got {type(question).__name__}")
    if not question.strip():
        raise ValueError("the question is empty")
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the question is no valid UTF-8 text, at {ascii(question[error.start])}"
        ) from error


def check_images(session: Any, images: Sequence) -> None:
    """Reject a question without an image for the embedded model: its answer would be meaningless.

    Raises:
        ValueError: images is empty and the model is the embedded one.
    """
    if not images and session.where == str(EMBEDDED):
        raise ValueError(
            "the embedded model answers questions about an image and no others: give an image"
        )
