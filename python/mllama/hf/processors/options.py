"""Options of a processor's call: transformers' own, each applied or rejected by name."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.processing_utils import ImagesKwargs, ProcessorMixin, TextKwargs

from mllama.hf.arguments import nearest

_WHOLE_CALL = ("return_mm_token_type_ids", "return_text_replacement_offsets")
_GROUPS = ("text_kwargs", "images_kwargs", "common_kwargs")


_TRUNCATION = ("longest_first", "only_first", "only_second", "do_not_truncate")
# Partly supported options: name -> (whether a value is supported, why others are not).
Refusals = Mapping[str, tuple[Callable[[Any], bool], str]]
_TENSORS = (lambda value: value in (None, "pt", "np"), "it is 'pt', 'np' or None")
_COUNT = (
    lambda value: (
        value is None or (isinstance(value, int) and not isinstance(value, bool) and value > 0)
    ),
    "it is a number above 0",
)
IMAGES: Refusals = {
    "return_tensors": _TENSORS,
    "data_format": (
        lambda value: value in (None, "channels_first"),
        "pixel_values are channels first",
    ),
    "device": (
        lambda value: value is None or torch.device(value).type == "cpu",
        "images are processed on the CPU; move the result",
    ),
    "do_convert_rgb": (lambda value: value is not False, "images are always made RGB"),
    "image_seq_length": (lambda value: value is None, "it is the processor's, not the call's"),
}
TEXT: Refusals = {
    "max_length": _COUNT,
    "pad_to_multiple_of": _COUNT,
    "padding": (
        lambda value: value in (True, False, None, "longest", "max_length", "do_not_pad"),
        "it is True, False or 'max_length'",
    ),
    "padding_side": (lambda value: value in (None, "left", "right"), "it is 'left' or 'right'"),
    "return_tensors": _TENSORS,
    "truncation": (
        lambda value: value in (True, False, None, *_TRUNCATION),
        f"it is True, False, {', '.join(map(repr, _TRUNCATION))}",
    ),
    "is_split_into_words": (lambda value: not value, "a prompt is one text"),
    "return_overflowing_tokens": (lambda value: not value, "a prompt is one row"),
    "stride": (lambda value: not value, "a prompt is one row"),
}

_Function = TypeVar("_Function", bound=Callable)


def on_cpu(function: _Function) -> _Function:
    """Run a function with the CPU as torch's default device, for tensors that transformers creates
    from lists and arrays.
    """

    @functools.wraps(function)
    def inner(*args: Any, **kwargs: Any) -> Any:
        with torch.device("cpu"):
            return function(*args, **kwargs)

    return inner  # type: ignore[return-value]  # of the same signature


def merge_options(
    processor: ProcessorMixin, options: Mapping[str, Any], refused: Refusals = TEXT
) -> dict[str, Any]:
    """Sort a call's options as transformers' processors do: text_kwargs, images_kwargs, and options
    of the whole call.

    Args:
        processor: has a tokenizer and an image processor.
        options: as given, flat or in text_kwargs, images_kwargs and common_kwargs.
        refused: partly supported text options; the image processor has its own.

    Raises:
        TypeError: an option is unknown, or of videos or audio, or a group is not a dict.
        ValueError: a value is not supported, or rejected by transformers.
    """
    images = {
        *ImagesKwargs.__annotations__,
        *processor.image_processor.valid_kwargs.__annotations__,
    }
    text = set(TextKwargs.__annotations__)
    known = {"text_kwargs": text, "images_kwargs": images, "common_kwargs": text | images}
    flat = {name: value for name, value in options.items() if name not in _GROUPS}
    for name in ("videos_kwargs", "audio_kwargs"):
        if flat.pop(name, None):
            raise TypeError(f"{name}: text and images are taken, no videos and no audio")
    check_names(processor, flat, text | images | {*_GROUPS, *_WHOLE_CALL})
    check_values(flat, refused)
    for group in _GROUPS:
        inner = options.get(group)
        if inner is not None and not isinstance(inner, Mapping):
            raise TypeError(f"{group} must be a dict, got {type(inner).__name__}")
        check_names(processor, inner or {}, known[group], f" in {group}")
        check_values(inner or {}, refused)
    given = {
        name: value for name, value in options.items() if value is not None or name not in _GROUPS
    }
    with in_one_line():
        merged = processor._merge_kwargs(
            tokenizer_init_kwargs=processor.tokenizer.init_kwargs, **given
        )
    for name in _WHOLE_CALL:  # which transformers also puts among the tokenizer's options
        merged["text_kwargs"].pop(name, None)
    return merged


@contextlib.contextmanager
def in_one_line() -> Iterator[None]:
    """Context that turns errors of transformers' option checks into one line.

    Raises:
        TypeError, ValueError: whichever the cause is.
    """
    try:
        yield
    except StrictDataclassError as error:
        kind = TypeError if isinstance(error.__cause__, TypeError) else ValueError
        raise kind(" ".join(str(error).split())[:300]) from error


def check_names(owner: Any, options: Iterable[str], known: Iterable[str], where: str = "") -> None:
    """Reject unknown options.

    Raises:
        TypeError: an option is unknown; the message has the most similar known name.
    """
    for name in options:
        if name not in known:
            hint = nearest(str(name), known)
            raise TypeError(f"{type(owner).__name__} has no option {name!r}{where}{hint}")


def check_values(options: Mapping[str, Any], refused: Refusals) -> None:
    """Reject unsupported values.

    Raises:
        ValueError: a value is not supported; the message names the option.
    """
    for name, value in options.items():
        taken, reason = refused.get(name, (None, ""))
        if taken is not None and not taken(value):
            raise ValueError(f"{name}={value!r} is not supported: {reason}")


def check_rows(rows: Iterable[list[int]], tensors: Any) -> None:
    """Reject rows of unequal length if they should become one tensor.

    Raises:
        ValueError: the lengths differ; the message names padding.
    """
    lengths = sorted({len(row) for row in rows})
    if tensors is not None and len(lengths) > 1:
        raise ValueError(
            f"padding is off, and rows of {lengths[0]} to {lengths[-1]} tokens are no tensor: "
            "give padding=True"
        )
