"""Prompts with images: plain layouts, the matching chat template, and the assignment of images to
prompts.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mllama.processing.image import is_image

IMAGE_TOKEN = "<image>"
MAX_IMAGE_TOKENS = (
    2**16
)  # placeholders per image; a folder with a larger number would exhaust the memory
LOCATION_TOKENS = tuple(f"<loc{i:04d}>" for i in range(1024)) + tuple(
    f"<seg{i:03d}>" for i in range(128)
)

# The layout of `lay_out` for conversations: all images, BOS, then alternately "question\n" and
# "answer<eos>". A message's text is its content, or its text parts joined. An <image> in it stands
# for an image, as an image part does, and moves to the front; the text around it is joined. If
# that would make a new <image> ("<ima<image>ge>"), the template raises. `generation` marks the
# answers for return_assistant_tokens_mask.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- macro words(content) -%}
{%- set rest = text(content) | replace('<image>', '') -%}
{%- if '<image>' in rest -%}
{{ raise_exception('a text with one <image> inside another') }}{%- endif -%}
{{ rest | trim }}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['content'] is not string -%}
{%- for part in message['content'] if part['type'] == 'image' -%}<image>{%- endfor -%}{%- endif -%}
{{ '<image>' * text(message['content']).count('<image>') }}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ words(message['content']) }}{{ eos_token }}{%- endgeneration -%}
{%- else -%}{{ words(message['content']) }}{{ '\\n' }}{%- endif -%}
{%- endfor -%}
"""


def lay_out(
    prompt: str, image_tokens: int, image_token: str = IMAGE_TOKEN, bos_token: str | None = None
) -> str:
    """Image tokens + BOS + prompt + newline.

    Without a BOS token (None) none is added. A BOS or newline that the prompt already has is not
    repeated.
    """
    bos = "" if bos_token is None or prompt.startswith(bos_token) else bos_token
    newline = "" if prompt.endswith("\n") else "\n"
    return image_token * image_tokens + bos + prompt + newline


def expand_images(prompt: str, image_token: str, count: int) -> tuple[str, list[dict]]:
    """Repeat each image token in a prompt `count` times. Also returns the replacements, as in
    transformers' text_replacement_offsets.
    """
    replacement, pieces = image_token * count, prompt.split(image_token)
    offsets, start, new_start = [], 0, 0
    for piece in pieces[:-1]:
        start, new_start = start + len(piece), new_start + len(piece)
        spans = (start, start + len(image_token)), (new_start, new_start + len(replacement))
        offsets.append(
            {
                "type": "image",
                "span": spans[0],
                "new_span": spans[1],
                "text": image_token,
                "replacement": replacement,
            }
        )
        start, new_start = spans[0][1], spans[1][1]
    return replacement.join(pieces), offsets


def merge_images(
    prompts: Sequence[str],
    images: Any,
    tokenizer: Any,
    image_token: str,
    count: int,
    as_is: bool = False,
    expand: Callable[[str], tuple[str, list[dict]]] | None = None,
) -> tuple[list[str], list[list[dict]], list[list], bool]:
    """Complete the prompts of a model with image placeholders in the text.

    A prompt without placeholders is laid out by `lay_out`. In a prompt with placeholders they are
    expanded in place, and only the tokenizer's own tokens are added, unless the text has BOS.

    Args:
        prompts: one or more prompts.
        images: in any form that `share_out` accepts.
        tokenizer: has bos_token, bos_token_id and encode.
        image_token: the placeholder.
        count: placeholders per image.
        as_is: add nothing, even to a prompt without placeholders.
        expand: replaces `expand_images`.

    Returns:
        The prompts, their replacements, the images of each prompt, and whether the tokenizer may
        add its own tokens.

    Raises:
        ValueError: there are no prompts, or the numbers of images and placeholders differ.
    """
    if not prompts:
        raise ValueError("text is an empty list: give at least one prompt")
    expand = expand or (lambda prompt: expand_images(prompt, image_token, count))
    texts, offsets = map(list, zip(*map(expand, prompts), strict=True))
    finished = [as_is or bool(places) for places in offsets]
    wanted = [len(places) if done else None for places, done in zip(offsets, finished, strict=True)]
    rows = share_out(images, wanted, image_token)
    bos = tokenizer.bos_token
    special = all(finished) and not any(bos and bos in text for text in texts)
    # If one prompt has BOS, the tokenizer must not add it, so it is written into the others.
    lead = bos if any(finished) and not special and adds_bos(tokenizer) else ""
    for number, text in enumerate(texts):
        if not finished[number]:
            texts[number] = lay_out(text, count * len(rows[number]), image_token, bos)
        elif lead and lead not in text:
            texts[number] = lead + text
            offsets[number] = inserted(0, lead, offsets[number])
    return texts, offsets, rows, special


def lay_out_prefix(prompt: str, images: int, image_token: str, count: int, bos: str | None) -> str:
    """PaliGemma's layout: as `lay_out`, but a prompt's own placeholders keep their order, with BOS
    after the last one.
    """
    cut = prompt.rfind(image_token) + len(image_token) if image_token in prompt else 0
    head = prompt[:cut] if cut else image_token * images
    tail = lay_out(prompt[cut:], 0, bos_token=None if bos and bos in prompt else bos)
    return head.replace(image_token, image_token * count) + tail


def put_bos(prompt: str, bos: str, image_token: str) -> str:
    """Llama-3.2-Vision's layout: BOS after leading placeholders, unless the prompt has it."""
    if bos in prompt:
        return prompt
    rest = prompt
    while rest.startswith(image_token):
        rest = rest[len(image_token) :]
    return prompt[: len(prompt) - len(rest)] + bos + rest


def inserted(place: int, text: str, offsets: Sequence[dict]) -> list[dict]:
    """Offsets of replacements (transformers' text_replacement_offsets) after inserting a text
    before all of them.
    """
    moved = [
        {**entry, "new_span": tuple(edge + len(text) for edge in entry["new_span"])}
        for entry in offsets
    ]
    return [
        {
            "type": "text",
            "span": (place, place),
            "new_span": (place, place + len(text)),
            "text": "",
            "replacement": text,
        },
        *moved,
    ]


def adds_bos(tokenizer) -> bool:
    """Whether the tokenizer adds BOS to every text."""
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer.encode("")


def in_order(text, images, *others) -> tuple:
    """(text, images), exchanged if they were clearly given in the other order.

    Raises:
        TypeError: text is neither a prompt nor a list of prompts, or there are videos or audio.
        ValueError: both are None.
    """
    if any(other is not None for other in others):
        raise TypeError("text and images are taken, no videos and no audio")
    if text is None and images is None:
        raise ValueError("give text, images, or both")
    if text is None or _is_text(text):
        return text, images
    if _is_images(text) and not _is_nothing(text) and (images is None or _is_text(images)):
        return images, text
    raise TypeError(
        f"text must be a prompt or a list of prompts, got {type(text).__name__}; name them: "
        "processor(text=..., images=...)"
    )


def check_whole(input_ids, image_token_id: int, wanted: Sequence[int]) -> None:
    """Reject token rows with another number of image tokens than wanted.

    Raises:
        ValueError: truncation removed image tokens.
    """
    for number, (ids, count) in enumerate(zip(input_ids, wanted, strict=False)):
        left = np.count_nonzero(np.asarray(ids) == image_token_id)
        if left != count:
            raise ValueError(
                f"truncation left {left} of the {count} image tokens of prompt {number}: raise "
                "max_length"
            )


def share_out(
    images, placeholders: Sequence[int | None], image_token: str = IMAGE_TOKEN
) -> list[list]:
    """Assign images to prompts.

    Args:
        images: None, one image, a flat list, an array of images [N, ...], or one list (or None)
            per prompt.
        placeholders: number of placeholders in each prompt; None for a prompt that takes any
            number. In a flat list, prompts with placeholders take their images in order; if there
            are none, a single prompt takes all images and several prompts take one each.

    Returns:
        One list of images per prompt.

    Raises:
        ValueError: the numbers of images and placeholders, or of images and prompts, differ; an
            array or list of several images is given where one image is expected.
    """
    prompts = len(placeholders)
    if images is None:
        images = []
    elif isinstance(images, tuple) or (
        isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4
    ):
        images = list(images)
    elif not isinstance(images, list):
        images = [images]
    for item in images:
        for image in item if isinstance(item, (list, tuple)) else [item]:
            _refuse_several(image)

    if any(row is None or isinstance(row, (list, tuple)) for row in images):
        rows = [
            list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row]
            for row in images
        ]
        if len(rows) != prompts:
            raise ValueError(f"{len(rows)} lists of images for {prompts} prompt(s)")
        for number, (row, wanted) in enumerate(zip(rows, placeholders, strict=True)):
            if wanted is not None and wanted != len(row):
                raise ValueError(
                    f"prompt {number} holds {wanted} {image_token} placeholder(s), but got "
                    f"{len(row)} image(s)"
                )
        return rows

    if any(wanted is not None for wanted in placeholders):
        total = sum(wanted or 0 for wanted in placeholders)
        if total != len(images):
            raise ValueError(
                f"{prompts} prompt(s) hold {total} {image_token} placeholder(s) in all, but got "
                f"{len(images)} image(s)"
            )
        rest = iter(images)
        return [[next(rest) for _ in range(wanted or 0)] for wanted in placeholders]
    if prompts == 1:
        return [images]
    if images and len(images) != prompts:
        raise ValueError(
            f"{len(images)} image(s) for {prompts} prompts: give one each, or one list of images "
            "per prompt"
        )
    return [[image] for image in images] or [[] for _ in range(prompts)]


def share_out_rows(prompts: Sequence[str], images: Any, image_token: str) -> list[list]:
    """Assign images to prompts, where a flat list belongs to one prompt.

    Raises:
        ValueError: the numbers of images and placeholders of a prompt differ, as always for a flat
            list with several prompts.
    """
    if images is None:
        images = [None] * len(prompts)
    nested = isinstance(images, (list, tuple)) and any(
        row is None or isinstance(row, (list, tuple)) for row in images
    )
    rows = share_out(
        list(images) if nested else images, [None] * (len(prompts) if nested else 1), image_token
    )
    wanted, given = [prompt.count(image_token) for prompt in prompts], [len(row) for row in rows]
    if wanted != given:
        raise ValueError(
            f"The number of {image_token} tokens in each prompt should be the same as the number of"
            f" images passed. Found {wanted} {image_token} tokens and {given} images per sample."
        )
    return rows


def _refuse_several(image) -> None:
    if isinstance(image, (list, tuple)):
        raise ValueError(
            "images are nested too deeply: give a flat list, or one list of images per prompt"
        )
    if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim > 3:
        raise ValueError(
            "an image in a list must be [H, W] or have one axis of channels, got shape "
            f"{tuple(image.shape)}: use list(array)"
        )


def _is_text(value) -> bool:
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    )


def _is_nothing(value) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(map(_is_nothing, value)))


def _is_images(value) -> bool:
    if isinstance(value, (list, tuple)):
        return all(item is None or _is_text(item) or _is_images(item) for item in value)
    return is_image(value)
