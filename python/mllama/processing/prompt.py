"""The text around the pictures: the layout of a prompt, the chat template that gives the same layout, and which picture belongs to which prompt."""

from collections.abc import Sequence

import numpy as np
import torch

IMAGE_TOKEN = "<image>"
LOCATION_TOKENS = tuple(f"<loc{i:04d}>" for i in range(1024)) + tuple(f"<seg{i:03d}>" for i in range(128))

# The layout of `lay_out` for conversations: every picture, BOS, then "question\n" and "answer<eos>" in turn. Pictures written into a text as
# <image> move to the front like the others. `generation` marks the answers for return_assistant_tokens_mask.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content | replace('<image>', '') }}{%- else -%}
{%- for part in content if part['type'] == 'text' -%}{{ part['text'] }}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
{%- if message['content'] is string -%}{{ '<image>' * message['content'].count('<image>') }}{%- else -%}
{%- for part in message['content'] if part['type'] == 'image' -%}<image>{%- endfor -%}{%- endif -%}
{%- endfor -%}
{{- bos_token -}}
{%- for message in messages -%}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{ text(message['content']) | trim }}{{ eos_token }}{%- endgeneration -%}
{%- else -%}{{ text(message['content']) | trim }}{{ '\\n' }}{%- endif -%}
{%- endfor -%}
"""


def lay_out(prompt: str, image_tokens: int, image_token: str = IMAGE_TOKEN, bos_token: str | None = None) -> str:
    """Return image tokens + BOS + prompt + newline.

    A tokenizer without BOS (None) adds none; a BOS or a newline that the prompt has already is not doubled.
    """
    bos = "" if bos_token is None or prompt.startswith(bos_token) else bos_token
    newline = "" if prompt.endswith("\n") else "\n"
    return image_token * image_tokens + bos + prompt + newline


def share_out(images, placeholders: Sequence[int], image_token: str = IMAGE_TOKEN) -> list[list]:
    """Return the pictures of each prompt.

    Args:
        images: None, one picture, a flat list, a [N, ...] array of pictures, or one list (or None) per prompt.
        placeholders: how many placeholders each prompt holds. A prompt that holds some takes as many pictures, in order.
            When none holds any, a flat list goes to a single prompt whole, and to several prompts one by one.

    Raises:
        ValueError: the pictures do not go out; the text counts both sides.
    """
    prompts, wanted = len(placeholders), sum(placeholders)
    if images is None:
        images = []
    if isinstance(images, (np.ndarray, torch.Tensor)) and images.ndim == 4 or isinstance(images, tuple):
        images = list(images)
    if not isinstance(images, list):
        images = [images]
    if any(row is None or isinstance(row, (list, tuple)) for row in images):
        return _check_rows([_as_row(row) for row in images], placeholders, image_token)
    if wanted:
        if wanted != len(images):
            raise ValueError(f"{prompts} prompt(s) hold {wanted} {image_token} placeholders in all, but {len(images)} picture(s) were given")
        rest = iter(images)
        return [[next(rest) for _ in range(count)] for count in placeholders]
    if prompts == 1 or not images:
        return [images] + [[] for _ in range(prompts - 1)]
    if len(images) != prompts:
        raise ValueError(f"{len(images)} picture(s) for {prompts} prompts: give one each, or one list of pictures per prompt")
    return [[image] for image in images]


def _as_row(row) -> list:
    if row is None:
        return []
    return list(row) if isinstance(row, (list, tuple)) else [row]


def _check_rows(rows: list[list], placeholders: Sequence[int], image_token: str) -> list[list]:
    if len(rows) != len(placeholders):
        raise ValueError(f"{len(rows)} lists of pictures for {len(placeholders)} prompt(s)")
    for number, (row, count) in enumerate(zip(rows, placeholders, strict=True)):
        if count and count != len(row):
            raise ValueError(f"prompt {number} holds {count} {image_token} placeholder(s), but {len(row)} picture(s) were given for it")
    return rows
