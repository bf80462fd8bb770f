"""The short way in: `load` a model with its processor, `ask` about a picture."""

import difflib
import functools
import inspect
import numbers
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, overload

import torch
from transformers import (
    BatchEncoding,
    BatchFeature,
    GenerationConfig,
    GenerationMixin,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)

from mllama.assets import EMBEDDED
from mllama.checkpoints import open_checkpoint
from mllama.checkpoints.hub import find_folder
from mllama.checkpoints.models import load_opened
from mllama.device import choose_device, choose_dtype, dtype_name
from mllama.hf.modeling import MllamaForConditionalGeneration
from mllama.hf.siglip import SiglipModel
from mllama.lora.loading import load_lora
from mllama.lora.peft import CONFIG as ADAPTER_CONFIG
from mllama.lora.peft import adapted_model
from mllama.processing.auto import encode_batch, encode_messages, load_processor
from mllama.processing.image import download_urls, is_image, load_picture
from mllama.processing.image_source import names_image
from mllama.weights.format import Opened

MAX_NEW_TOKENS = 128
# below this temperature, 0 included, sampling is the likeliest token, and dividing by it would
# overflow
_COLDEST = 1e-3
_NEUTRAL = {"temperature": 1, "top_k": 0, "top_p": 1, "min_p": 0}  # values that change nothing
_SAMPLING = tuple(_NEUTRAL)
_UNREAD = (
    "num_return_sequences",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
)
_LIMITS = (
    "it answers short English questions about six shapes, ten colors and five places in simple images; to anything else its answers mean"
    " nothing (docs/embedded-model.md)"
)
_COUNTS = ("max_new_tokens", "max_length", "num_beams")
_KINDS = [
    *((name, numbers.Integral, "an int") for name in (*_COUNTS, "top_k")),
    *((name, numbers.Real, "a number") for name in ("temperature", "top_p", "min_p")),
]


class Answer(NamedTuple):
    """A generated answer: its text, and how many tokens it took, the end token included."""

    text: str
    tokens: int


def load(
    path: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    reference: str = "meta",
    adapter: str | os.PathLike | None = None,
) -> tuple[MllamaForConditionalGeneration | Any, Any]:
    """Load a model of any family and its processor; what was chosen is said on stderr, once.

    transformers' `AutoModelForImageTextToText` makes its own class of most of these folders, which
    does not use this package's operators; `MllamaForConditionalGeneration.from_pretrained(path)` is
    the model alone that does.

    Args:
        path: a model folder, a GGUF file, or a model's id on the hub; None is the model that comes
            with the package. A folder of adapters in PEFT's format is the model that it is for,
            with them.
        dtype: "float32", "bfloat16", "float16" or the torch dtype. "auto" is by the device:
            bfloat16 where it computes in it, float16 on older CUDA devices, else float32; and
            float32 on a CPU for weights of less than 64 MB.
        device: as torch names it. "auto" is the first CUDA device, else the CPU.
        reference: whose Llama-3.2-Vision to follow, "meta" or "hf"; it means nothing to other
            families.
        adapter: adapters to put into the model, as `mllama.load_lora` takes them.

    Returns:
        The model, in eval mode: MllamaForConditionalGeneration, or SiglipModel for a SigLIP vision
            model alone. And what it needs before
        it: the processor, the tokenizer of a text model, the image processor of a SigLIP.

    Raises:
        TypeError: a path or adapter that is no path.
        FileNotFoundError: no such folder or model, or a file missing in it.
        ValueError: an empty path; a dtype, device or reference that is not known or not here; an
            unknown family, or broken files; adapters that do not fit the model.
    """
    model, processor = load_quietly(path, dtype, device, reference, adapter)
    say_loaded(path, model)
    return model, processor


def load_quietly(
    path: str | os.PathLike | None,
    dtype: str | torch.dtype,
    device: str | torch.device,
    reference: str = "meta",
    adapter: str | os.PathLike | None = None,
) -> tuple[MllamaForConditionalGeneration | Any, Any]:
    """`load` without the line on stderr, which `say_loaded` writes."""
    if not isinstance(adapter, (str, os.PathLike, type(None))):
        raise TypeError(f"adapter must be a str, a path or None, got {type(adapter).__name__}")
    folder, device = find_model(path), choose_device(device)
    if (folder / ADAPTER_CONFIG).is_file():
        if adapter is not None:
            raise ValueError(
                f"{folder} holds adapters, and adapter names others: give the model's own folder with one of them"
            )
        folder, adapter = find_model(adapted_model(folder)), folder
    with (opened := open_checkpoint(folder)).source:
        found = model_class(opened.config)
        options: dict[str, Any] = (
            {"reference": reference} if "reference" in found.load_options else {}
        )
        model, _ = load_opened(
            found, opened, resolve_dtype(opened, dtype, device), device, **options
        )
    if adapter is not None:
        load_lora(model, adapter)
    return model, processor_of(folder)


def resolve_dtype(
    opened: Opened, dtype: str | torch.dtype, device: torch.device
) -> str | torch.dtype:
    """What "auto" means for opened files on a device; another dtype as it is."""
    if not isinstance(dtype, str) or dtype != "auto":
        return dtype
    headers = opened.source.headers().values()
    return choose_dtype(
        device, sum(torch.Size(header.shape).numel() * header.dtype.itemsize for header in headers)
    )


def processor_of(folder: Path) -> Any:
    """`load_processor`, of a folder that holds a model."""
    try:
        return load_processor(folder)
    except ValueError as error:  # broken JSON does not say where
        raise ValueError(
            f"{folder} holds a model, but its processor cannot be read: {error}"
        ) from error


def find_model(path: str | os.PathLike | None) -> Path:
    """Where a model's files are: the embedded model's for None, the path's own, or where the hub's
    files of that id were put.

    Raises:
        TypeError: a path that is no path.
        ValueError: an empty path.
        FileNotFoundError: as `mllama.checkpoints.hub.find_folder`.
    """
    if not isinstance(path, (str, os.PathLike, type(None))):
        raise TypeError(f"path must be a str, a path or None, got {type(path).__name__}")
    return EMBEDDED if path is None else find_folder(path)


def model_class(
    config: PretrainedConfig,
) -> type[MllamaForConditionalGeneration] | type[SiglipModel]:
    """The class that a config's models are of: SiglipModel for a SigLIP vision model alone."""
    return SiglipModel if isinstance(config, SiglipVisionConfig) else MllamaForConditionalGeneration


def say_loaded(path: str | os.PathLike | None, model: PreTrainedModel) -> None:
    """Say on stderr which model was loaded, its dtype and device, and of the embedded one its
    limits; the same line is said once.
    """
    _say(
        f"mllama: {'the embedded model' if path is None else Path(path)} in {dtype_name(model.dtype)} on {model.device}"
    )
    if path is None:
        _say(f"mllama: {_LIMITS}")


@overload
def ask(
    picture: Any,
    question: str,
    model: PreTrainedModel | None = None,
    processor: Any = None,
    *,
    allow_urls: bool = False,
    **generate_kwargs: Any,
) -> str: ...
@overload
def ask(
    picture: Any,
    question: list[str] | tuple[str, ...],
    model: PreTrainedModel | None = None,
    processor: Any = None,
    *,
    allow_urls: bool = False,
    **generate_kwargs: Any,
) -> list[str]: ...
def ask(
    picture: Any,
    question: str | Sequence[str],
    model: PreTrainedModel | None = None,
    processor: Any = None,
    *,
    allow_urls: bool = False,
    **generate_kwargs: Any,
) -> str | list[str]:
    """Ask about an image, about several at once, or in text alone; a list of questions is answered
    in one batch.

    Args:
        picture: an image in any form of `mllama.processing.image.load_picture` (a path, bytes, a
            file object, a data URL, a PIL image, an array, a tensor ...), or a list of them for one
            question about several; None for a question in text alone, which every family with a
            chat template takes. To a list of questions one image belongs to them all, and a list
            holds what belongs to each: an image, a list of images, or None.
        question: in words; of PaliGemma its prefix, such as "caption en" or "detect cat ; dog". Or
            a list of questions.
        model, processor: what `load` returned; None for both is the embedded model, loaded once.
        allow_urls: download images given as http(s) URLs.
        generate_kwargs: of transformers' `generate`. By default at most 128 new tokens, and always
            the likeliest: give a temperature, top_k, top_p or min_p to sample.

    Returns:
        The answer's text; a list of them, in order, to a list of questions.

    Raises:
        TypeError: a picture, question, model, processor or option of another type; an option that
            `generate` does not have, with the nearest that it has.
        ValueError: model without processor or the reverse; a SigLIP, which has no decoder; a
            question that is empty, no valid text, too long for the model or has the picture's
            placeholder in it; picture and question swapped; a picture that cannot be read, or for a
            model that takes none; the embedded model without a picture; an option out of its range,
            or without effect.
        FileNotFoundError: no such picture.
    """
    if (model is None) != (processor is None):
        raise ValueError(
            "give model and processor both, as mllama.load returns them, or neither for the embedded model"
        )
    refuse_swapped(picture, question)
    if model is None:
        model, processor = _embedded()
    check_answers(model)
    for name, value, method in (
        ("model", model, "generate"),
        ("processor", processor, "apply_chat_template"),
    ):
        if not hasattr(value, method):  # not by class: adapters wrap models
            raise TypeError(f"{name} must be as mllama.load returns it, got {type(value).__name__}")
    for name in generate_kwargs:
        value = generate_kwargs[name]
        if (
            name in _UNREAD
            and value is not None
            and value != (1 if name == "num_return_sequences" else 0)
        ):
            raise ValueError(
                f"{name} has no effect here, where the answer's text alone is returned: call model.generate"
            )
    one = isinstance(question, str)
    questions = [question] if isinstance(question, str) else list(question)
    images = [_as_list(picture)] if one else _share(picture, len(questions))
    for row in images:
        check_images(model, row)
    inputs = encode_questions(processor, images, questions, allow_urls=allow_urls)
    texts = [found.text for found in answers(model, processor, inputs, **generate_kwargs)]
    if len(texts) != len(questions):
        raise ValueError(
            "generation_config must leave num_return_sequences at 1: every question has one answer"
        )
    return texts[0] if one else texts


def refuse_swapped(picture, question) -> None:
    """Refuse `ask(question, picture)`, and a question that is no text.

    Raises:
        TypeError: the question is no text.
        ValueError: it names an image, and the picture is the question.
    """
    shown = picture if isinstance(picture, (list, tuple)) else [picture]
    is_words = bool(shown) and all(
        isinstance(text, str) and not names_image(text) for text in shown
    )
    if is_words and (is_image(question) or (isinstance(question, str) and names_image(question))):
        raise ValueError("picture and question are swapped: the picture comes first")
    if isinstance(question, str):
        return
    if not isinstance(question, (list, tuple)) or not all(isinstance(one, str) for one in question):
        raise TypeError(
            f"the question must be a str, got {type(question).__name__} (to ask several, a list of str)"
        )
    if not question:
        raise ValueError("the question is an empty list")


def _as_list(picture) -> list:
    """The images of one question."""
    if picture is None:
        return []
    return (
        list(picture)
        if isinstance(picture, (list, tuple)) or getattr(picture, "ndim", 3) == 4
        else [picture]
    )


def _share(picture, questions: int) -> list[list]:
    """The images of each question."""
    if not isinstance(picture, (list, tuple)):
        row = _as_list(picture)
        return [
            [load_picture(image) if hasattr(image, "read") else image for image in row]
        ] * questions  # a stream is read once
    if len(picture) != questions:
        raise ValueError(
            f"picture is a list of {len(picture)} for {questions} questions: give one image for all, or one entry for each"
        )
    return [_as_list(entry) for entry in picture]


def check_images(model, images: Sequence) -> None:
    """Refuse the embedded model without an image: it would answer all the same.

    Raises:
        ValueError: no images for the embedded model.
    """
    if not images and is_embedded(model):
        raise ValueError(
            "the embedded model answers questions about an image and no others: give an image"
        )


def is_embedded(model) -> bool:
    """True for the model that comes with the package."""
    return getattr(getattr(model, "config", None), "name_or_path", None) == str(EMBEDDED)


def encode(
    processor,
    picture,
    question: str,
    turns: Sequence[tuple[str, str]] = (),
    system: str | None = None,
    allow_urls: bool = False,
) -> BatchFeature:
    """The model's inputs for a question about a picture or a list of them (None: about none), after
    earlier turns of (question, answer).

    Written by the processor's chat template; without one, by the family's plain layout, which takes
    no turns and no system prompt.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `ask`.
    """
    return encode_questions(processor, [_as_list(picture)], [question], turns, system, allow_urls)


def encode_questions(
    processor,
    images: Sequence[Sequence],
    questions: Sequence[str],
    turns: Sequence[tuple[str, str]] = (),
    system: str | None = None,
    allow_urls: bool = False,
) -> BatchFeature:
    """`encode` for a batch: the images of each question, and the questions."""
    image_token = getattr(processor, "image_token", None)
    conversations = []
    for question in questions:
        check_question(question)
        if image_token and image_token in question:
            raise ValueError(
                f"the question must not contain {image_token!r}, which stands for the picture in a prompt"
            )
        said = [*(text for turn in turns for text in turn), question]
        messages = [
            {"role": "assistant" if index % 2 else "user", "content": text}
            for index, text in enumerate(said)
        ]
        conversations.append(
            messages if system is None else [{"role": "system", "content": system}, *messages]
        )
    if system is not None:
        check_system(processor, system)
    rows = [
        [load_picture(image) for image in download_urls(list(row), allow_urls)] for row in images
    ]
    return encode_batch(processor, conversations, rows)


def check_system(processor, system: str) -> None:
    """Refuse a system prompt that would not reach the model.

    Raises:
        ValueError: it is empty or holds the picture's placeholder; no chat template, or one that
            leaves it out or refuses it.
    """
    if not system.strip():
        raise ValueError("the system prompt is empty")
    if (image_token := getattr(processor, "image_token", None)) and image_token in system:
        raise ValueError(
            f"the system prompt must not contain {image_token!r}, which stands for the picture in a prompt"
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


def check_answers(model) -> None:
    """Refuse a model that cannot answer.

    Raises:
        ValueError: a SigLIP vision model, of this package or of transformers.
    """
    if isinstance(getattr(model, "config", None), SiglipVisionConfig):
        raise ValueError("a SigLIP vision model has no decoder to answer with")


def check_question(question: str) -> None:
    """Refuse what no processor takes as a question.

    Raises:
        TypeError: no str.
        ValueError: empty, or with surrogates, which is how Python holds bytes that are no text.
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


def answer(
    model: PreTrainedModel, processor, inputs: BatchFeature | BatchEncoding, **generate_kwargs
) -> Answer:
    """Generate the answer to one encoded prompt; `generate_kwargs` as `ask` takes them.

    Raises:
        TypeError: an option of another type, or that `generate` does not have.
        ValueError: the prompt fills the model's context; an option that `generate` refuses.
    """
    return answers(model, processor, inputs, **generate_kwargs)[0]


def answers(
    model: PreTrainedModel, processor, inputs: BatchFeature | BatchEncoding, **generate_kwargs
) -> list[Answer]:
    """`answer` to each row of a batch that is padded on the left."""
    output = generate(model, inputs, **generate_kwargs)
    sequences = getattr(output, "sequences", output)
    if len(sequences) == 1:
        return [read_answer(processor, inputs, sequences)]
    settings = generate_kwargs.get("generation_config") or model.generation_config
    ends = generate_kwargs.get("eos_token_id", settings.eos_token_id)
    rows = [_until_end(row, inputs["input_ids"].shape[1], ends) for row in sequences]
    return [read_answer(processor, inputs, row[None]) for row in rows]


def _until_end(sequence: torch.Tensor, prompt: int, ends: int | list[int] | None) -> torch.Tensor:
    """A row of a batch without what follows the end of its answer."""
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    places = torch.isin(
        sequence[prompt:], torch.tensor(ends, dtype=sequence.dtype, device=sequence.device)
    ).nonzero()
    return sequence[: prompt + int(places[0]) + 1] if len(places) else sequence


def generate(model: Any, inputs: BatchFeature | BatchEncoding, **generate_kwargs) -> Any:
    """What `model.generate` returns for encoded prompts, with `ask`'s defaults and checks, which
    raise what `answer` says.
    """
    room = check_room(model, inputs)
    options = _options(generate_kwargs)
    if "max_new_tokens" in options:
        options["max_new_tokens"] = min(options["max_new_tokens"], room)
    with torch.inference_mode():
        return model.generate(**inputs.to(model.device), **options)


def read_answer(processor, inputs: Mapping, sequences: torch.Tensor) -> Answer:
    """The answer in the ids that `generate` returned, [1, prompt and answer]."""
    new = sequences[0, inputs["input_ids"].shape[1] :]
    return Answer(tokenizer_of(processor).decode(new, skip_special_tokens=True).strip(), len(new))  # type: ignore[union-attr]


def tokenizer_of(processor) -> PreTrainedTokenizerBase:
    """A processor's tokenizer; a tokenizer is its own."""
    return getattr(processor, "tokenizer", processor)


def room_left(model: PreTrainedModel, inputs: Mapping) -> int:
    """Tokens that an encoded prompt leaves for the answer in the model's context."""
    return model.config.get_text_config().max_position_embeddings - inputs["input_ids"].shape[1]


def check_room(model: PreTrainedModel, inputs: Mapping) -> int:
    """`room_left`, at least 1.

    Raises:
        ValueError: the prompt fills the model's context.
    """
    prompt, room = inputs["input_ids"].shape[1], room_left(model, inputs)
    if room < 1:
        raise ValueError(
            f"the prompt is {prompt} tokens long; this model takes {prompt + room}, answer included"
        )
    return room


def _options(given: dict) -> dict:
    """generate's options: greedy unless something about sampling is asked for."""
    options = {name: value for name, value in given.items() if value is not None}
    _check_known(options)
    for name, kind, word in _KINDS:
        value = options.get(name, 1)
        if not isinstance(value, kind) or isinstance(value, bool):
            raise TypeError(f"{name} must be {word}, got {type(value).__name__}")
        if name in _COUNTS and value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
        if kind is numbers.Real and name in options:
            options[name] = float(value)  # transformers refuses whole numbers
    if "generation_config" in options:
        return options
    if options.get("do_sample") is False and (
        unused := [
            name for name in _SAMPLING if options.get(name, _NEUTRAL[name]) != _NEUTRAL[name]
        ]
    ):
        raise ValueError(f"{', '.join(unused)}: without effect beside do_sample=False")
    if "max_length" not in options:
        options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    if 0 <= options.get("temperature", 1) < _COLDEST:
        options = {name: value for name, value in options.items() if name not in _SAMPLING} | {
            "do_sample": False
        }
    options.setdefault("do_sample", any(name in options for name in _SAMPLING))
    return options


def _check_known(options: Mapping) -> None:
    """Refuse what `generate` does not have, which transformers would take for an argument of the
    model.
    """
    known = {
        name for name in vars(GenerationConfig()) if not name.startswith("_")
    } | _generate_arguments()
    for name in options:
        if name not in known:
            near = difflib.get_close_matches(name, known, 1)
            raise TypeError(
                f"generate has no option {name!r}{''.join(f': did you mean {other}?' for other in near)}"
            )


@functools.cache
def _generate_arguments() -> set[str]:
    named = inspect.signature(GenerationMixin.generate).parameters.keys() - {
        "self",
        "inputs",
        "kwargs",
    }
    return {*named, "tokenizer", "assistant_tokenizer"}  # these it takes from its kwargs


@functools.cache
def _embedded() -> tuple[PreTrainedModel, Any]:
    return load()


@functools.cache
def _say(line: str) -> None:
    if sys.stderr is not None:  # None where it was closed, and print would take stdout for it
        print(line, file=sys.stderr)
