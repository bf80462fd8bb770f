"""The text around the images: a prompt's layout, the chat template of the same layout, and which
image belongs to which prompt.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from mllama.processing.image import is_image

IMAGE_TOKEN = "<image>"
MAX_IMAGE_TOKENS = (
    2**16
)  # of one image; what a folder says above that is no model's, and would fill the memory
LOCATION_TOKENS = tuple(f"<loc{i:04d}>" for i in range(1024)) + tuple(
    f"<seg{i:03d}>" for i in range(128)
)

# The layout of `lay_out` for conversations: every image, BOS, then "question\n" and "answer<eos>"
# in turn. A message's text is its string content, or its text parts joined. Each <image> in it
# stands for an image, as an image part does, and moves to the front; what is around it is joined.
# Where that would make a new <image> ("<ima<image>ge>"), the template raises. `generation` marks
# the answers for return_assistant_tokens_mask.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}{%- else -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- macro words(content) -%}
{%- set rest = text(content) | replace('<image>', '') -%}
{%- if '<image>' in rest -%}{{ raise_exception('a text with one <image> inside another') }}{%- endif -%}
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
    """Return image tokens + BOS + prompt + newline.

    A tokenizer without BOS (None) adds none; a BOS or a newline that the prompt has already is not
    doubled.
    """
    bos = "" if bos_token is None or prompt.startswith(bos_token) else bos_token
    newline = "" if prompt.endswith("\n") else "\n"
    return image_token * image_tokens + bos + prompt + newline


def expand_images(prompt: str, image_token: str, count: int) -> tuple[str, list[dict]]:
    """Return a prompt with each image token repeated `count` times, and where that was done, as
    transformers' text_replacement_offsets has it.
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
    """Return the finished prompts of a model whose images stand in the text.

    A prompt without placeholders is laid out by `lay_out`; one that holds some is expanded in place
    and nothing is added, except what the tokenizer itself adds to every text, and that not where
    the text has BOS already.

    Args:
        prompts: one or more.
        images: as `share_out` takes them.
        tokenizer: with bos_token, bos_token_id and encode.
        image_token: the placeholder.
        count: placeholders per image.
        as_is: add nothing to a prompt even where it holds no placeholder.
        expand: in the place of `expand_images`.

    Returns:
        The prompts, where their placeholders went, the images of each, and whether the tokenizer
        may add its own tokens.

    Raises:
        ValueError: no prompts; images and placeholders differ in number.
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
    # Where the tokenizer may not add BOS, since another prompt has one, it is written into those
    # that lack it.
    lead = bos if any(finished) and not special and adds_bos(tokenizer) else ""
    for number, text in enumerate(texts):
        if not finished[number]:
            texts[number] = lay_out(text, count * len(rows[number]), image_token, bos)
        elif lead and lead not in text:
            texts[number] = lead + text
            offsets[number] = inserted(0, lead, offsets[number])
    return texts, offsets, rows, special


def lay_out_prefix(prompt: str, images: int, image_token: str, count: int, bos: str | None) -> str:
    """PaliGemma's layout: `lay_out`, where a prompt that holds placeholders keeps their order, with
    BOS after the last.
    """
    cut = prompt.rfind(image_token) + len(image_token) if image_token in prompt else 0
    head = prompt[:cut] if cut else image_token * images
    tail = lay_out(prompt[cut:], 0, bos_token=None if bos and bos in prompt else bos)
    return head.replace(image_token, image_token * count) + tail


def put_bos(prompt: str, bos: str, image_token: str) -> str:
    """Llama-3.2-Vision's layout: BOS in front, after leading placeholders, unless the prompt has
    it.
    """
    if bos in prompt:
        return prompt
    rest = prompt
    while rest.startswith(image_token):
        rest = rest[len(image_token) :]
    return prompt[: len(prompt) - len(rest)] + bos + rest


def inserted(place: int, text: str, offsets: Sequence[dict]) -> list[dict]:
    """Offsets of replacements (transformers' text_replacement_offsets) with a text put in at a
    place before all of them.
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
    """True when the tokenizer puts BOS into every text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer.encode("")


def in_order(text, images, *others) -> tuple:
    """(text, images), exchanged where they were plainly given the other way round.

    Raises:
        TypeError: text is neither a prompt nor a list of prompts, or there are others: videos,
            audio.
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
    """Refuse token rows whose image tokens are not as many as wanted.

    Raises:
        ValueError: truncation cut image tokens away.
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
    """Return the images of each prompt.

    Args:
        images: None, one image, a flat list, a [N, ...] array of images, or one list (or None)
            per prompt.
        placeholders: how many placeholders each prompt holds, None for a prompt that takes what it
            is given. Of a flat list, prompts with placeholders take their images in order;
            without any, a single prompt takes all and several take one each.

    Raises:
        ValueError: images and placeholders, or images and prompts, differ in number (the text
            counts both); an array of several images, or a list of them, stands where one image
            belongs.
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
    """Return the images of each prompt, where a flat list is one prompt's.

    Raises:
        ValueError: images and placeholders differ in number in some prompt, which a flat list for
            several prompts always does.
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
