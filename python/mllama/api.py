"""The short way in: `load` a model with its processor, `ask` about an image."""

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from mllama.assets import EMBEDDED
from mllama.checkpoints import open_checkpoint
from mllama.checkpoints.models import fill, lay_out
from mllama.checkpoints.opened import Opened
from mllama.device import choose_device, choose_dtype, dtype_name, dtype_named
from mllama.lora.loading import load_lora
from mllama.lora.peft import CONFIG as ADAPTER_CONFIG
from mllama.lora.peft import adapted_model
from mllama.model.model import VisionLanguageModel
from mllama.processing.auto import load_preprocessor
from mllama.runtime.questions import as_list, encode_questions, refuse_swapped, share_images
from mllama.runtime.session import OPTIONS, Session
from mllama.runtime.settings import beyond_session, check_settings
from mllama.weights.stock_names import own_names

if TYPE_CHECKING:
    from mllama.hf.answering import GenerateSession
    from mllama.hf.modeling import MllamaForConditionalGeneration
    from mllama.hf.names import PreTrainedModel

_UNREAD = (
    "num_return_sequences",
    "return_dict_in_generate",
    "output_attentions",
    "output_hidden_states",
    "output_logits",
    "output_scores",
)
_LIMITS = (
    "it answers short English questions about six shapes, ten colors and five places in simple "
    "images; to anything else its answers mean nothing (docs/embedded-model.md)"
)


def load(
    path: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    reference: str = "meta",
    adapter: str | os.PathLike | None = None,
) -> "tuple[MllamaForConditionalGeneration | Any, Any]":
    """Load a model of any family and its processor; what was chosen is said on stderr, once.

    Both are transformers' kinds. transformers' `AutoModelForImageTextToText` makes its own class of
    most of these folders, which does not use this package's operators;
    `MllamaForConditionalGeneration.from_pretrained(path)` is the model alone that does.

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
            model alone. And what it needs before it: the processor, the tokenizer of a text model,
            the image processor of a SigLIP.

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
) -> "tuple[MllamaForConditionalGeneration | Any, Any]":
    """`load` without the line on stderr, which `say_loaded` writes."""
    from mllama.hf.checkpoints import load_opened
    from mllama.hf.models import model_class
    from mllama.hf.processors.auto import load_processor

    folder, adapter = _find_adapted(path, adapter)
    device = choose_device(device)
    with (opened := open_checkpoint(folder)).source:
        found: Any = model_class(opened.spec)
        options: dict[str, Any] = (
            {"reference": reference} if "reference" in found.load_options else {}
        )
        dtype = resolve_dtype(opened, dtype, device)
        model, _ = load_opened(found, opened, dtype, device, **options)
    if adapter is not None:
        load_lora(model, adapter)
    return model, processor_of(folder, load_processor)


def open_session(
    path: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    reference: str = "meta",
    adapter: str | os.PathLike | None = None,
) -> "Session | GenerateSession":
    """A session of a model's files: the core's own; transformers', where the model's settings ask
    for what the core's does not have, or only it reads the tokenizer.

    Args:
        path, dtype, device, reference, adapter: as `load` takes them.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `load`. A SigLIP, which has no decoder.
    """
    folder, own_adapter = _find_adapted(path, adapter)
    place = choose_device(device)
    with (opened := open_checkpoint(folder)).source:
        if opened.spec.text is None:
            raise ValueError("a SigLIP vision model has no decoder to answer with")
        settings, where = opened.generation or {}, opened.source.where
        processor = None if beyond_session(settings) else _core_processor(folder)
        if processor is not None:
            check_settings(where, settings)
            model = _load_core(opened, dtype, place, reference)
            if own_adapter is not None:
                load_lora(model, own_adapter)
            return Session(model, processor, settings, where)
    from mllama.hf.answering import GenerateSession

    return GenerateSession(*load_quietly(path, dtype, device, reference, adapter))


def _core_processor(folder: Path) -> Any:
    """None where only transformers reads it, or says what is wrong with it."""
    try:
        return load_preprocessor(folder)
    except ValueError:
        return None


def _load_core(
    opened: Opened, dtype: str | torch.dtype, device: torch.device, reference: str
) -> VisionLanguageModel:
    model = lay_out(opened, lambda spec: VisionLanguageModel(spec, reference=reference))
    fill(model, opened, dtype_named(resolve_dtype(opened, dtype, device)), lambda name: device)
    # load_lora asks for it, of adapters under transformers' names.
    weight_map = opened.family.weight_map(opened.spec)
    model.__dict__["own_names"] = functools.partial(own_names, weight_map)
    return model.eval()


def _find_adapted(
    path: str | os.PathLike | None, adapter: str | os.PathLike | None
) -> tuple[Path, str | os.PathLike | None]:
    """A model's files, and the adapters for it: a folder of adapters is the model that they are
    for, with them.
    """
    if not isinstance(adapter, (str, os.PathLike, type(None))):
        raise TypeError(f"adapter must be a str, a path or None, got {type(adapter).__name__}")
    folder = find_model(path)
    if not (folder / ADAPTER_CONFIG).is_file():
        return folder, adapter
    if adapter is not None:
        raise ValueError(
            f"{folder} holds adapters, and adapter names others: give the model's own folder with "
            "one of them"
        )
    return find_model(adapted_model(folder)), folder


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


def processor_of(folder: Path, load: Callable[[Path], Any]) -> Any:
    """`load`, of a folder that holds a model."""
    try:
        return load(folder)
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
    if path is None:
        return EMBEDDED
    if path != "" and Path(path).exists():
        return Path(path)
    from mllama.checkpoints.hub import find_folder  # the hub's client takes its time to import

    return find_folder(path)


def say_loaded(path: str | os.PathLike | None, model: torch.nn.Module) -> None:
    """Say on stderr which model was loaded, its dtype and device, and of the embedded one its
    limits; the same line is said once.
    """
    name, first = "the embedded model" if path is None else Path(path), next(model.parameters())
    _say(f"mllama: {name} in {dtype_name(first.dtype)} on {first.device}")
    if path is None:
        _say(f"mllama: {_LIMITS}")


@overload
def ask(
    image: Any,
    question: str,
    model: "PreTrainedModel | None" = None,
    processor: Any = None,
    *,
    allow_urls: bool = False,
    **generate_kwargs: Any,
) -> str: ...
@overload
def ask(
    image: Any,
    question: list[str] | tuple[str, ...],
    model: "PreTrainedModel | None" = None,
    processor: Any = None,
    *,
    allow_urls: bool = False,
    **generate_kwargs: Any,
) -> list[str]: ...
def ask(
    image: Any,
    question: str | Sequence[str],
    model: "PreTrainedModel | None" = None,
    processor: Any = None,
    *,
    allow_urls: bool = False,
    **generate_kwargs: Any,
) -> str | list[str]:
    """Ask about an image, about several at once, or in text alone; a list of questions is answered
    in one batch.

    Args:
        image: an image in any form of `mllama.processing.image.load_picture` (a path, bytes, a
            file object, a data URL, a PIL image, an array, a tensor ...), or a list of them for one
            question about several; None for a question in text alone, which every family with a
            chat template takes. To a list of questions one image belongs to them all, and a list
            holds what belongs to each: an image, a list of images, or None.
        question: in words; of PaliGemma its prefix, such as "caption en" or "detect cat ; dog". Or
            a list of questions.
        model, processor: what `load` returned; None for both is the embedded model, loaded once.
        allow_urls: download images given as http(s) URLs.
        generate_kwargs: of transformers' `generate`. By default at most 128 new tokens, and always
            the likeliest: give a temperature, top_k, top_p or min_p to sample. The embedded model
            takes those, max_new_tokens, do_sample, repetition_penalty and eos_token_id without
            transformers.

    Returns:
        The answer's text; a list of them, in order, to a list of questions.

    Raises:
        TypeError: an image, question, model, processor or option of another type; an option that
            `generate` does not have, with the nearest that it has.
        ValueError: model without processor or the reverse; a SigLIP, which has no decoder; a
            question that is empty, no valid text, too long for the model or has the image's
            placeholder in it; image and question swapped; an image that cannot be read, or for a
            model that takes none; the embedded model without an image; an option out of its range,
            or without effect.
        FileNotFoundError: no such image.
    """
    if (model is None) != (processor is None):
        raise ValueError(
            "give model and processor both, as mllama.load returns them, or neither for the "
            "embedded model"
        )
    refuse_swapped(image, question)
    session = _session_of(model, processor, generate_kwargs)
    for name, value in generate_kwargs.items():
        neutral = (None, 1) if name == "num_return_sequences" else (None, 0)
        if name in _UNREAD and value not in neutral:
            raise ValueError(
                f"{name} has no effect here, where the answer's text alone is returned: call "
                "model.generate"
            )
    one = isinstance(question, str)
    questions = [question] if isinstance(question, str) else list(question)
    images = [as_list(image)] if one else share_images(image, len(questions))
    for row in images:
        check_images(session, row)
    inputs = encode_questions(session.processor, images, questions, allow_urls=allow_urls)
    given = {name: value for name, value in generate_kwargs.items() if value is not None}
    answers = [row.text.strip() for row in session.generate(inputs, **given).completions]
    return answers[0] if one else answers


def _session_of(model: Any, processor: Any, options: Mapping[str, Any]) -> Any:
    """A session of its own for every call: one holds what was asked last."""
    if model is None:
        model, processor, settings, where = _embedded(bool(_beyond(options)))
    else:
        settings, where = None, None
        check_answers(model)
    # Not by class: adapters wrap models.
    if not hasattr(model, "generate") and not hasattr(model, "compute"):
        raise TypeError(f"model must be as mllama.load returns it, got {type(model).__name__}")
    if not hasattr(processor, "chat_template"):
        raise TypeError(
            f"processor must be as mllama.load returns it, got {type(processor).__name__}"
        )
    if not hasattr(model, "generate"):
        return Session(model, processor, settings, where)
    from mllama.hf.answering import GenerateSession

    return GenerateSession(model, processor)


@functools.cache
def _embedded(by_transformers: bool) -> tuple[Any, Any, Any, str]:
    """The embedded model, its processor and settings: the core's, or transformers'."""
    if by_transformers:
        return *load(), None, str(EMBEDDED)
    session: Any = open_session()
    say_loaded(None, session.model)
    return session.model, session.processor, session.settings, session.where


def _beyond(options: Mapping[str, Any]) -> list[str]:
    """Options that the core's session does not have, or nobody."""
    return [name for name, value in options.items() if value is not None and name not in OPTIONS]


def check_images(session: "Session | GenerateSession", images: Sequence) -> None:
    """Refuse the embedded model without an image: it would answer all the same.

    Raises:
        ValueError: no images for the embedded model.
    """
    if not images and session.where == str(EMBEDDED):
        raise ValueError(
            "the embedded model answers questions about an image and no others: give an image"
        )


def check_answers(model: Any) -> None:
    """Refuse a model that cannot answer.

    Raises:
        ValueError: a SigLIP vision model, of this package or of transformers.
    """
    if getattr(getattr(model, "config", None), "model_type", None) == "siglip_vision_model":
        raise ValueError("a SigLIP vision model has no decoder to answer with")


@functools.cache
def _say(line: str) -> None:
    if sys.stderr is not None:  # None where it was closed, and print would take stdout for it
        print(line, file=sys.stderr)
