"""Chat templates of processors and tokenizers: any form of content, masks of the assistant's tokens
for any template, and labels.
"""

import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jinja2 import Environment, meta
from transformers import BatchEncoding, PreTrainedTokenizerBase
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from mllama.hf.processors.answers import apply_template, as_batch
from mllama.hf.processors.options import on_cpu
from mllama.processing.messages import ASSISTANT, IMAGE_KEYS, as_parts, as_text

IGNORED = -100  # a label that losses ignore
_TOKENIZING = (
    "tokenize",
    "return_dict",
    "return_tensors",
    "return_assistant_tokens_mask",
)  # not needed for rendering text
_PLACES = {"return_offsets_mapping": True}
_GENERATION = re.compile(r"\{%[-+]?\s*(end)?generation\s*[-+]?%\}")


@on_cpu
def chat_labels(
    processor: Any, conversations: Sequence, **options: Any
) -> BatchFeature | BatchEncoding:
    """Encode conversations for training: a model's inputs, with labels for the assistant's tokens.

    The answers are found in the output of any chat template, each from the end of its prompt to its
    end token. PaliGemma, which has no chat template, takes one question with its images and one
    answer, as prefix and suffix.

    Args:
        processor: a processor or a fast tokenizer, of this package or of transformers.
        conversations: one conversation or a list: messages {"role": ..., "content": ...}, with
            their images in the image parts.
        options: options of the processor's (tokenizer's) apply_chat_template. By default rows are
            padded to the longest.

    Returns:
        The processor's output as torch tensors, and labels [rows, tokens] int64: the ids of the
        assistant's tokens, -100 elsewhere. `(batch["labels"] != -100).sum()` is the number of
        trained tokens.

    Raises:
        TypeError: a processor, conversation or message has the wrong type.
        ValueError: a conversation has no answer, the chat template is missing or its answers
            cannot be found, truncation leaves no token to train, or the processor raises it.
    """
    if not isinstance(processor, (ProcessorMixin, PreTrainedTokenizerBase)):
        raise TypeError(
            f"processor must be a processor or a tokenizer, got {type(processor).__name__}"
        )
    if (
        isinstance(processor, ProcessorMixin)
        and processor.chat_template is None
        and "suffix" in inspect.signature(processor.__call__).parameters
    ):
        batch = _prefix_and_suffix(processor, conversations, options)
    else:
        batch = _masked(processor, conversations, options)
        mask = batch.pop("assistant_masks")
        batch["labels"] = batch["input_ids"].masked_fill(
            torch.as_tensor(mask, device=batch["input_ids"].device) != 1, IGNORED
        )
    if not bool((batch["labels"] != IGNORED).any()):
        raise ValueError(
            "conversations: truncation leaves no token of an answer to train; raise max_length"
        )
    return batch


class ChatTemplates:
    """apply_chat_template of a processor, for any template and any form of content."""

    def apply_chat_template(self, conversation, chat_template: str | None = None, **kwargs):
        """As transformers': messages to text, or with tokenize=True, return_dict=True to a batch,
        including the images in the messages.

        A part {"type": "image", "image": image} takes any form that `load_image` accepts; "path"
        and "url" name files. Contents may be a text or a list of parts, whichever the template
        reads; an assistant's may be None. With return_assistant_tokens_mask=True answers are found
        even if the template does not mark them.

        Raises:
            TypeError, ValueError: messages are invalid, or their answers cannot be found.
        """
        return _processor_template(
            super().apply_chat_template, self, conversation, chat_template, kwargs
        )


def with_answers(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """Give the tokenizer `ChatTemplates`' apply_chat_template; returns the same tokenizer."""
    tokenizer.apply_chat_template = functools.partial(apply_tokenizer_template, tokenizer)
    return tokenizer


@on_cpu
def apply_tokenizer_template(tokenizer: PreTrainedTokenizerBase, conversation, *args, **kwargs):
    """A tokenizer's apply_chat_template, for any template and any form of content."""
    stock = functools.partial(type(tokenizer).apply_chat_template, tokenizer)
    bound = inspect.signature(stock).bind(conversation, *args, **kwargs)
    bound.apply_defaults()
    options = {**bound.arguments, **bound.arguments.pop("kwargs", {})}
    options.pop("kwargs", None)
    options.pop("conversation")
    template = tokenizer.get_chat_template(options["chat_template"], options["tools"])
    if "image" not in template:
        parts = [
            part
            for messages in as_batch(conversation)[1]
            for message in messages
            for part in _parts(message)
        ]
        if any(part["type"] == "image" for part in parts):
            raise ValueError(
                "conversation holds an image, which the chat template of a text model does not take"
            )
    rendering = {
        **options,
        "tokenize": False,
        "return_dict": False,
        "return_assistant_tokens_mask": False,
        "sanitize_control_tokens": False,
    }

    def render(messages: list[dict], **changes: Any) -> str:
        return stock(messages, **{**rendering, **changes})

    places = {"tokenizer_kwargs": {**(options["tokenizer_kwargs"] or {}), **_PLACES}}
    return apply_template(stock, render, template, tokenizer, conversation, options, places)


@on_cpu
def _processor_template(
    stock,
    processor: ProcessorMixin,
    conversation,
    chat_template: str | None,
    options: dict[str, Any],
):
    """`ChatTemplates.apply_chat_template` on transformers' method `stock`."""
    template = _template_of(processor, chat_template)
    variables = {} if template is None else _variables(template)
    own = inspect.signature(ProcessorMixin.apply_chat_template).parameters
    loose = {
        name: value for name, value in options.items() if name not in own and name not in variables
    }  # as transformers, of the call
    options = {name: value for name, value in options.items() if name not in loose}
    options["processor_kwargs"] = {**(options.get("processor_kwargs") or {}), **loose}
    rendering = {
        name: value
        for name, value in options.items()
        if name not in (*_TOKENIZING, "processor_kwargs", "sanitize_control_tokens")
    }

    def call(messages, **options: Any):
        return stock(messages, chat_template, **options)

    def render(messages: list[dict], **changes: Any) -> str:
        return stock(messages, chat_template, **{**rendering, **changes})

    if template is not None and "image" not in template:
        conversation, images = _images_apart(conversation, processor.image_token)
        if any(images):
            options["processor_kwargs"]["images"] = (
                images if as_batch(conversation)[0] else images[0]
            )
    places = {
        "processor_kwargs": {
            **options["processor_kwargs"],
            **_PLACES,
            "return_text_replacement_offsets": True,
        }
    }
    return apply_template(
        call, render, template, processor.tokenizer, conversation, options, places
    )


def _images_apart(conversation: Any, image_token: str) -> tuple[Any, list[list]]:
    """A conversation or several for a template that reads texts only, with placeholders in them;
    and the images of each.
    """
    batched, conversations = as_batch(conversation)
    images: list[list] = []
    for messages in conversations:
        images.append([])
        for message in messages:
            shown = [part for part in _parts(message) if part["type"] == "image"]
            images[-1] += [part[key] for part in shown for key in IMAGE_KEYS if key in part]
            if shown:
                message["content"] = as_text(message["content"], image_token)
    return conversations if batched else conversations[0], images


def _parts(message: dict) -> list[dict]:
    return message["content"] if isinstance(message["content"], list) else []


def _template_of(processor: ProcessorMixin, chat_template: str | None) -> str | None:
    """The text of the template to render; None if there is none, which transformers reports."""
    templates = processor.chat_template
    if isinstance(templates, Mapping):
        return templates.get("default" if chat_template is None else chat_template, chat_template)
    return templates if chat_template is None else chat_template


@functools.lru_cache(maxsize=32)
def _variables(template: str) -> frozenset[str]:
    """Variables that a template reads and does not set; empty for an invalid template, which
    rendering reports.
    """
    try:
        return frozenset(
            meta.find_undeclared_variables(
                Environment(extensions=["jinja2.ext.loopcontrols"]).parse(
                    _GENERATION.sub("", template)
                )
            )
        )
    except Exception:
        return frozenset()


def _masked(
    processor: Any, conversations: Sequence, options: dict[str, Any]
) -> BatchFeature | BatchEncoding:
    options = {
        "tokenize": True,
        "return_dict": True,
        "return_tensors": "pt",
        **options,
        "return_assistant_tokens_mask": True,
    }
    if isinstance(processor, PreTrainedTokenizerBase):
        return apply_tokenizer_template(processor, conversations, **{"padding": True, **options})
    options["processor_kwargs"] = {"padding": True, **(options.get("processor_kwargs") or {})}
    if isinstance(processor, ChatTemplates):
        return processor.apply_chat_template(conversations, **options)
    return _processor_template(
        processor.apply_chat_template,
        processor,
        conversations,
        options.pop("chat_template", None),
        options,
    )


def _prefix_and_suffix(
    processor: ProcessorMixin, conversations: Sequence, options: dict[str, Any]
) -> BatchFeature:
    rows = as_batch(conversations)[1]
    for number, messages in enumerate(rows):
        roles = [message["role"] for message in messages]
        if roles != ["user", ASSISTANT]:
            raise ValueError(
                f"conversation {number} must be one message of the user and one of the assistant, "
                f"as prefix and suffix, got {roles}"
            )
    images = [
        [_image(part) for part in as_parts(messages[0]["content"]) if part["type"] == "image"]
        for messages in rows
    ]
    prefixes, suffixes = (
        [as_text(messages[side]["content"]) for messages in rows] for side in (0, 1)
    )
    options = {
        "padding": True,
        **options,
        **(options.pop("processor_kwargs", None) or {}),
        "return_tensors": "pt",
    }
    return processor(
        text=prefixes, images=images if any(images) else None, suffix=suffixes, **options
    )


def _image(part: Mapping) -> Any:
    own = [part[key] for key in IMAGE_KEYS if part.get(key) is not None]
    if len(own) != 1:
        raise ValueError(
            f"an image part must bring one image, as image, path or url, got {len(own)}"
        )
    return own[0]
