"""The text around the pictures: a prompt's layout, the chat template of the same layout, and which
picture belongs to which prompt.
"""

from collections.abc import Sequence

import numpy as np
import torch

from mllama.processing.image import is_image

IMAGE_TOKEN = "<image>"
MAX_IMAGE_TOKENS = (
    2**16
)  # of one picture; what a folder says above that is no model's, and would fill the memory
LOCATION_TOKENS = tuple(f"<loc{i:04d}>" for i in range(1024)) + tuple(
    f"<seg{i:03d}>" for i in range(128)
)

# The layout of `lay_out` for conversations: every picture, BOS, then "question\n" and "answer<eos>"
# in turn. A message's text is its string content, or its text parts joined. Each <image> in it
# stands for a picture, as an image part does, and moves to the front; what is around it is joined.
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
    return (
        tokenizer.bos_token_id is not None and tokenizer.bos_token_id in tokenizer("")["input_ids"]
    )


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
    if _is_pictures(text) and not _is_nothing(text) and (images is None or _is_text(images)):
        return images, text
    raise TypeError(
        f"text must be a prompt or a list of prompts, got {type(text).__name__}; name them: processor(text=..., images=...)"
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
                f"truncation left {left} of the {count} image tokens of prompt {number}: raise max_length"
            )


def share_out(
    images, placeholders: Sequence[int | None], image_token: str = IMAGE_TOKEN
) -> list[list]:
    """Return the pictures of each prompt.

    Args:
        images: None, one picture, a flat list, a [N, ...] array of pictures, or one list (or None)
            per prompt.
        placeholders: how many placeholders each prompt holds, None for a prompt that takes what it
            is given. Of a flat list, prompts with placeholders take their pictures in order;
            without any, a single prompt takes all and several take one each.

    Raises:
        ValueError: pictures and placeholders, or pictures and prompts, differ in number (the text
            counts both); an array of several pictures, or a list of them, stands where one picture
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
        for picture in item if isinstance(item, (list, tuple)) else [item]:
            _refuse_several(picture)

    if any(row is None or isinstance(row, (list, tuple)) for row in images):
        rows = [
            list(row) if isinstance(row, (list, tuple)) else [] if row is None else [row]
            for row in images
        ]
        if len(rows) != prompts:
            raise ValueError(f"{len(rows)} lists of pictures for {prompts} prompt(s)")
        for number, (row, wanted) in enumerate(zip(rows, placeholders, strict=True)):
            if wanted is not None and wanted != len(row):
                raise ValueError(
                    f"prompt {number} holds {wanted} {image_token} placeholder(s), but got {len(row)} picture(s)"
                )
        return rows

    if any(wanted is not None for wanted in placeholders):
        total = sum(wanted or 0 for wanted in placeholders)
        if total != len(images):
            raise ValueError(
                f"{prompts} prompt(s) hold {total} {image_token} placeholder(s) in all, but got {len(images)} picture(s)"
            )
        rest = iter(images)
        return [[next(rest) for _ in range(wanted or 0)] for wanted in placeholders]
    if prompts == 1:
        return [images]
    if images and len(images) != prompts:
        raise ValueError(
            f"{len(images)} picture(s) for {prompts} prompts: give one each, or one list of pictures per prompt"
        )
    return [[image] for image in images] or [[] for _ in range(prompts)]


def _refuse_several(picture) -> None:
    if isinstance(picture, (list, tuple)):
        raise ValueError(
            "pictures are nested too deeply: give a flat list, or one list of pictures per prompt"
        )
    if isinstance(picture, (np.ndarray, torch.Tensor)) and picture.ndim > 3:
        raise ValueError(
            f"a picture in a list must be [H, W] or have one axis of channels, got shape {tuple(picture.shape)}: use list(array)"
        )


def _is_text(value) -> bool:
    return isinstance(value, str) or (
        isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)
    )


def _is_nothing(value) -> bool:
    return value is None or (isinstance(value, (list, tuple)) and all(map(_is_nothing, value)))


def _is_pictures(value) -> bool:
    if isinstance(value, (list, tuple)):
        return all(item is None or _is_text(item) or _is_pictures(item) for item in value)
    return is_image(value)
