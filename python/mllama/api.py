"""The short way in: `load` a model with its processor, `ask` about a picture."""

import functools
import numbers
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import BatchEncoding, BatchFeature, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, SiglipVisionConfig

from mllama._device import choose_device, choose_dtype, dtype_name
from mllama.assets import EMBEDDED
from mllama.checkpoints import open_checkpoint
from mllama.checkpoints.formats import Opened
from mllama.checkpoints.hub import find_folder
from mllama.checkpoints.models import load_opened
from mllama.lora.files import load_lora
from mllama.lora.peft import CONFIG as ADAPTER_CONFIG
from mllama.lora.peft import adapted_model
from mllama.modeling import MllamaForConditionalGeneration
from mllama.processing.auto import encode_messages, load_processor
from mllama.processing.image import load_picture
from mllama.siglip import SiglipModel

MAX_NEW_TOKENS = 128
_COLDEST = 1e-3  # below this temperature, 0 included, sampling is the likeliest token, and dividing by it would overflow
_SAMPLING = ("temperature", "top_k", "top_p", "min_p")
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

    transformers' `AutoModelForImageTextToText` makes its own class of most of these folders, which does not use this package's operators;
    `MllamaForConditionalGeneration.from_pretrained(path)` is the model alone that does.

    Args:
        path: a model folder, a GGUF file, or a model's id on the hub; None is the model that comes with the package. A folder of adapters
            in PEFT's format is the model that it is for, with them.
        dtype: "float32", "bfloat16", "float16" or the torch dtype. "auto" is by the device: bfloat16 where it computes in it, float16 on
            older CUDA devices, else float32; and float32 on a CPU for weights of less than 64 MB.
        device: as torch names it. "auto" is the first CUDA device, else the CPU.
        reference: whose Llama-3.2-Vision to follow, "meta" or "hf"; it means nothing to other families.
        adapter: adapters to put into the model, as `mllama.load_lora` takes them.

    Returns:
        The model, in eval mode: MllamaForConditionalGeneration, or SiglipModel for a SigLIP vision model alone. And what it needs before
        it: the processor, the tokenizer of a text model, the image processor of a SigLIP.

    Raises:
        TypeError: a path or adapter that is no path.
        FileNotFoundError: no such folder or model, or a file missing in it.
        ValueError: an empty path; a dtype, device or reference that is not known or not here; an unknown family, or broken files; adapters
            that do not fit the model.
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
            raise ValueError(f"{folder} holds adapters, and adapter names others: give the model's own folder with one of them")
        folder, adapter = find_model(adapted_model(folder)), folder
    with (opened := open_checkpoint(folder)).source:
        found = model_class(opened.config)
        options: dict[str, Any] = {"reference": reference} if "reference" in found.load_options else {}
        model, _ = load_opened(found, opened, resolve_dtype(opened, dtype, device), device, **options)
    if adapter is not None:
        load_lora(model, adapter)
    return model, processor_of(folder)


def resolve_dtype(opened: Opened, dtype: str | torch.dtype, device: torch.device) -> str | torch.dtype:
    """What "auto" means for opened files on a device; another dtype as it is."""
    if not isinstance(dtype, str) or dtype != "auto":
        return dtype
    headers = opened.source.headers().values()
    return choose_dtype(device, sum(torch.Size(header.shape).numel() * header.dtype.itemsize for header in headers))


def processor_of(folder: Path) -> Any:
    """`load_processor`, of a folder that holds a model."""
    try:
        return load_processor(folder)
    except ValueError as error:  # broken JSON does not say where
        raise ValueError(f"{folder} holds a model, but its processor cannot be read: {error}") from error


def find_model(path: str | os.PathLike | None) -> Path:
    """Where a model's files are: the embedded model's for None, the path's own, or where the hub's files of that id were put.

    Raises:
        TypeError: a path that is no path.
        ValueError: an empty path.
        FileNotFoundError: as `mllama.checkpoints.hub.find_folder`.
    """
    if not isinstance(path, (str, os.PathLike, type(None))):
        raise TypeError(f"path must be a str, a path or None, got {type(path).__name__}")
    return EMBEDDED if path is None else find_folder(path)


def model_class(config: PretrainedConfig) -> type[MllamaForConditionalGeneration] | type[SiglipModel]:
    """The class that a config's models are of: SiglipModel for a SigLIP vision model alone."""
    return SiglipModel if isinstance(config, SiglipVisionConfig) else MllamaForConditionalGeneration


def say_loaded(path: str | os.PathLike | None, model: PreTrainedModel) -> None:
    """Say on stderr which model was loaded, its dtype and device; the same line is said once."""
    _say(f"mllama: {'the embedded model' if path is None else Path(path)} in {dtype_name(model.dtype)} on {model.device}")


def ask(
    picture: Any,
    question: str,
    model: PreTrainedModel | None = None,
    processor: Any = None,
    **generate_kwargs: Any,
) -> str:
    """Ask one question about one picture, or without one.

    Args:
        picture: a path, a PIL picture, a numpy array or a torch tensor, as `mllama.processing.image.load_picture` takes it; None for a
            question in text alone, which every family with a chat template takes.
        question: in words; of PaliGemma its prefix, such as "caption en" or "detect cat ; dog".
        model, processor: what `load` returned; None for both is the embedded model, loaded once.
        generate_kwargs: of transformers' `generate`. By default at most 128 new tokens, and always the likeliest: give a temperature,
            top_k, top_p or min_p to sample.

    Returns:
        The answer's text.

    Raises:
        TypeError: a picture, question, model, processor or option of another type.
        ValueError: model without processor or the reverse; a SigLIP, which has no decoder; a question that is empty, no valid text, too
            long for the model or has the picture's placeholder in it; a picture that cannot be read, or for a model that takes none; an
            option out of its range.
        FileNotFoundError: no such picture.
    """
    if (model is None) != (processor is None):
        raise ValueError("give model and processor both, as mllama.load returns them, or neither for the embedded model")
    if model is None:
        model, processor = _embedded()
    check_answers(model)
    for name, value, method in (("model", model, "generate"), ("processor", processor, "apply_chat_template")):
        if not hasattr(value, method):  # not by class: adapters wrap models
            raise TypeError(f"{name} must be as mllama.load returns it, got {type(value).__name__}")
    return answer(model, processor, encode(processor, picture, question), **generate_kwargs).text


def encode(processor, picture, question: str, turns: Sequence[tuple[str, str]] = ()) -> BatchFeature:
    """The model's inputs for a question about a picture (None: about none), after earlier turns of (question, answer).

    Written by the processor's chat template; without one, by the family's plain layout, which takes no turns.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `ask`.
    """
    check_question(question)
    image_token = getattr(processor, "image_token", None)
    if image_token and image_token in question:
        raise ValueError(f"the question must not contain {image_token!r}, which stands for the picture in a prompt")
    said = [*(text for turn in turns for text in turn), question]
    messages = [{"role": "assistant" if index % 2 else "user", "content": text} for index, text in enumerate(said)]
    return encode_messages(processor, messages, [] if picture is None else [load_picture(picture)])


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
        raise ValueError(f"the question is no valid UTF-8 text, at {ascii(question[error.start])}") from error


def answer(model: PreTrainedModel, processor, inputs: BatchFeature | BatchEncoding, **generate_kwargs) -> Answer:
    """Generate the answer to one encoded prompt; `generate_kwargs` as `ask` takes them.

    Raises:
        TypeError: an option of another type.
        ValueError: the prompt fills the model's context; an option that `generate` refuses.
    """
    output = generate(model, inputs, **generate_kwargs)
    return read_answer(processor, inputs, getattr(output, "sequences", output))


def generate(model: Any, inputs: BatchFeature | BatchEncoding, **generate_kwargs) -> Any:
    """What `model.generate` returns for one encoded prompt, with `ask`'s defaults and checks, which raise what `answer` says."""
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
        raise ValueError(f"the prompt is {prompt} tokens long; this model takes {prompt + room}, answer included")
    return room


def _options(given: dict) -> dict:
    """generate's options: greedy unless something about sampling is asked for."""
    options = {name: value for name, value in given.items() if value is not None}
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
    if "max_length" not in options:
        options.setdefault("max_new_tokens", MAX_NEW_TOKENS)
    if 0 <= options.get("temperature", 1) < _COLDEST:
        options = {name: value for name, value in options.items() if name not in _SAMPLING} | {"do_sample": False}
    options.setdefault("do_sample", any(name in options for name in _SAMPLING))
    return options


@functools.cache
def _embedded() -> tuple[PreTrainedModel, Any]:
    return load()


@functools.cache
def _say(line: str) -> None:
    if sys.stderr is not None:  # None where it was closed, and print would take stdout for it
        print(line, file=sys.stderr)
