"""The high-level interface: `load` a model with its processor, `ask` about an image."""

import functools
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

import torch

from mllama.assets import EMBEDDED
from mllama.checkpoints import open_checkpoint
from mllama.device import dtype_name, dtype_named
from mllama.lora.loading import load_adapters
from mllama.lora.reading import Paths, find_base
from mllama.lora.state import merge_and_unload
from mllama.model.offload import check_gpu_layers, offload
from mllama.processing.auto import load_preprocessor, processor_of
from mllama.quant.packer import AUTO, choose_weights, optimize, packing_of
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.loading import load_core
from mllama.runtime.progress import Progress, loading
from mllama.runtime.questions import (
    as_list,
    check_images,
    check_same_tokenizer,
    encode_questions,
    refuse_swapped,
    share_images,
)
from mllama.runtime.session import OPTIONS, Session
from mllama.runtime.settings import beyond_session, check_settings

if TYPE_CHECKING:
    from mllama.hf.answering import GenerateSession
    from mllama.hf.modeling import MllamaForConditionalGeneration
    from mllama.hf.names import PreTrainedModel

_OUTPUTS = ("attentions", "hidden_states", "logits", "scores")
_UNREAD = "num_return_sequences", "return_dict_in_generate", *(f"output_{x}" for x in _OUTPUTS)
_LIMITS = (
    "it answers short English questions about six shapes, ten colors and five places in simple "
    "images; to anything else its answers mean nothing (docs/embedded-model.md)"
)


def load(
    path: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    reference: str = "meta",
    adapter: Paths | None = None,
    weights: str | None = None,
    gpu_layers: int | None = None,
) -> "tuple[MllamaForConditionalGeneration | Any, Any]":
    """Load a model of any family and its processor. Prints what was chosen to stderr, once.

    Both are classes of transformers' kind. transformers' `AutoModelForImageTextToText` builds its
    own classes from most of these folders, without this package's operators.
    `MllamaForConditionalGeneration.from_pretrained(path)` loads the model alone.

    Args:
        path: a model folder, a GGUF file, or a model id on the hub. Default: the model embedded in
            the package. A folder of adapters in PEFT's format loads their base model with them.
        dtype: "float32", "bfloat16", "float16" or the torch dtype. "auto" depends on the device:
            bfloat16 where it is supported, float16 on older CUDA devices, else float32; on a CPU,
            float32 for weights of less than 64 MB.
        device: a torch device. "auto" is the first CUDA device, else the CPU.
        reference: which implementation of Llama-3.2-Vision to follow, "meta" or "hf". Other
            families ignore it.
        adapter: LoRA adapters to load into the model, as `mllama.load_lora` accepts them. Several
            by name, {"name": path}: the first is used until `mllama.activate_lora` says otherwise.
        weights: pack the weights for inference: a format of `mllama.optimize`; "file", the file's
            own types, such as GGUF's blocks; "auto", "file" with float32 as dtype, where the model
            can be packed and is on the CPU; or "none". An adapter is merged first, which "file"
            does not allow; several by name stay beside packed weights. Default: as a folder of
            packed weights (`mllama quantize`) says, else not packed, so that the model can be
            trained and saved.
        gpu_layers: for a model that does not fit a GPU: how many of the decoder's first layers have
            their weights there. Those of the others stay in the host's memory and are copied, two
            layers at a time, while the layer before computes, in every pass. For inference.
            Default: all.

    Returns:
        (model, processor). The model is in eval mode: MllamaForConditionalGeneration, or
            SiglipModel for a SigLIP vision model. The processor is the tokenizer for a text model,
            the image processor for SigLIP.

    Raises:
        TypeError: path or adapter is not a path.
        FileNotFoundError: the folder or model does not exist, or one of its files is missing.
        ValueError: path is empty; the dtype, device or reference is unknown or not available; the
            family is unknown or the files are broken; the adapters do not fit the model; weights
            is unknown, or there are no kernels for it on the device; gpu_layers is negative, or
            there is no CUDA device or no decoder.
    """
    both = load_quietly(path, dtype, device, reference, adapter, weights, None, gpu_layers)
    model, processor = both
    say_loaded(path, model)
    return model, processor


def load_quietly(
    path: str | os.PathLike | None,
    dtype: str | torch.dtype,
    device: str | torch.device,
    reference: str = "meta",
    adapter: Paths | None = None,
    weights: str | None = None,
    progress: Progress | None = None,
    gpu_layers: int | None = None,
) -> "tuple[MllamaForConditionalGeneration | Any, Any]":
    """`load` without the line on stderr, which `say_loaded` writes."""
    from mllama.hf.checkpoints import load_opened
    from mllama.hf.models import model_class
    from mllama.hf.processors.auto import load_processor

    folder, adapter = _find_adapted(path, adapter)
    with (opened := open_checkpoint(folder)).source:
        place = opened.choose_device(device)
        found: Any = model_class(opened.spec)
        check_gpu_layers(gpu_layers, place, opened.spec.text is not None)
        options: dict[str, Any] = {"progress": loading(progress), "gpu_layers": gpu_layers}
        if "reference" in found.load_options:
            options["reference"] = reference
        dtype = opened.resolve_dtype(dtype, place)
        weights = choose_weights(weights, opened.packing, place, adapter is not None)
        packed = weights if _packs_while_loading(adapter) else None
        model, _ = load_opened(found, opened, dtype, place, weights=packed, **options)
    _adapt(model, adapter, weights)
    offload(model, gpu_layers, place)
    return model, processor_of(folder, load_processor)


def open_session(
    path: str | os.PathLike | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    reference: str = "meta",
    adapter: Paths | None = None,
    weights: str | None = AUTO,
    progress: Progress | None = None,
    draft_model: str | os.PathLike | None = None,
    gpu_layers: int | None = None,
    **options: Any,
) -> "Session | GenerateSession":
    """Open a session: the core's own, or one on transformers' `generate` where the model's
    settings or its tokenizer need transformers.

    Args:
        path, dtype, device, reference, adapter, weights, gpu_layers: as `load` takes them, but
            packed where that is possible by default.
        progress: as `Session` takes it; while loading, stage "load" counts parameters.
        draft_model: where a smaller model of text is, that guesses tokens as `Session` says; it is
            loaded with the same dtype, device and weights.
        options: kv_cache, image_cache, prompt_lookup_tokens, as `Session` takes them.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `load` and `Session`. ValueError for SigLIP: no
            decoder; a draft_model with another tokenizer; for options of the core's own session
            where transformers' `generate` runs.
    """
    options = {name: value for name, value in options.items() if value is not None}
    folder, own_adapter = _find_adapted(path, adapter)
    with (opened := open_checkpoint(folder)).source:
        place = opened.choose_device(device)
        if opened.spec.text is None:
            raise ValueError("a SigLIP vision model has no decoder to answer with")
        weights = choose_weights(weights, opened.packing, place, own_adapter is not None)
        settings, where = opened.generation or {}, opened.source.where
        processor = None if beyond_session(settings) else _core_processor(folder)
        if processor is not None:
            check_settings(where, settings)
            packed = weights if _packs_while_loading(own_adapter) else None
            loaded_as = dtype_named(opened.resolve_dtype(dtype, place))
            check_gpu_layers(gpu_layers, place, True)
            model = load_core(opened, loaded_as, place, reference, packed, progress, gpu_layers)
            _adapt(model, own_adapter, weights)
            offload(model, gpu_layers, place)
            if draft_model is not None:
                draft = open_session(draft_model, dtype, device, weights=weights, progress=progress)
                check_same_tokenizer(processor, draft.processor)
                options["draft_model"] = draft.model
            return Session(model, processor, settings, where, progress=progress, **options)
    if draft_model is not None or options:
        name = "draft_model" if draft_model is not None else next(iter(options))
        raise ValueError(
            f"{name} must be None: this model's settings or tokenizer need transformers' generate, "
            "which has none, or its own"
        )
    from mllama.hf.answering import GenerateSession

    both = load_quietly(path, dtype, device, reference, adapter, weights, progress, gpu_layers)
    return GenerateSession(*both, progress)


def _core_processor(folder: Path) -> Any:
    """None if only transformers can read it, or report what is wrong with it."""
    try:
        return load_preprocessor(folder)
    except ValueError:
        return None


def _packs_while_loading(adapter: Paths | None) -> bool:
    """Whether weights can be packed as they are read: one adapter is merged first, several not."""
    return adapter is None or isinstance(adapter, Mapping)


def _adapt(model: Any, adapter: Paths | None, weights: str | None) -> None:
    """Load adapters, if any. Weights that shall be packed are packed with one adapter in them;
    several by name stay beside them.
    """
    if adapter is None:
        return
    beside = _packs_while_loading(adapter)
    if packing_of(model) is not None and not beside:
        raise ValueError(
            "packed weights take no adapter: give the model that they were packed from, with "
            "adapter and weights"
        )
    load_adapters(model, adapter)
    if weights is not None and not beside:
        optimize(merge_and_unload(model), weights)


def _find_adapted(
    path: str | os.PathLike | None, adapter: Paths | None
) -> tuple[Path, Paths | None]:
    """The model's files and the adapters to load. A folder of adapters names its base model."""
    folder = find_model(path)
    base, adapters = find_base(folder, adapter)
    return folder if base is None else find_model(base), adapters


def find_model(path: str | os.PathLike | None) -> Path:
    """Locate a model's files: the embedded model for None, an existing path, or the local copy of
    a model id on the hub.

    Raises:
        TypeError: path is not a path.
        ValueError: path is empty.
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
    """Print the model, its dtype and device to stderr, and the embedded model's limits. The same
    line is printed once.
    """
    name, first = "the embedded model" if path is None else Path(path), next(model.parameters())
    packing = packing_of(model)
    packed = f", weights packed as {packing}" if packing not in (None, "f32", "bf16") else ""
    _say(f"mllama: {name} in {dtype_name(first.dtype)} on {first.device}{packed}")
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
    """Ask about one or several images, or in text alone. A list of questions runs as one batch.

    Args:
        image: an image in any form that `mllama.processing.image.load_image` accepts (a path,
            bytes, a file object, a data URL, a PIL image, an array, a tensor ...), or a list of
            them for one question about several. None asks in text alone, for models with a chat
            template. With a list of questions, one image is used for all of them, and a list has
            one entry per question: an image, a list of images, or None.
        question: the question, or a list of questions. For PaliGemma a prefix such as "caption en"
            or "detect cat ; dog".
        model, processor: as returned by `load`. Default: the embedded model, loaded once.
        allow_urls: download images given as http(s) URLs.
        generate_kwargs: options of transformers' `generate`. Default: at most 128 new tokens,
            greedy; temperature, top_k, top_p or min_p turn sampling on. The embedded model
            handles these, max_new_tokens, do_sample, repetition_penalty and eos_token_id without
            transformers.

    Returns:
        The answer, or a list of answers in the order of the questions.

    Raises:
        TypeError: an image, question, model, processor or option has the wrong type, or `generate`
            has no such option (the error names the nearest one).
        ValueError: only one of model and processor is given; the model is a SigLIP, which has no
            decoder; the question is empty, not valid text, too long, or contains the image
            placeholder; image and question are swapped; an image cannot be read or the model takes
            none; the embedded model gets no image; an option is out of range or has no effect.
        FileNotFoundError: the image file does not exist.
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
    """A new session for every call: a session keeps the cache of its last prompt."""
    settings = where = images = None
    if model is None:
        beyond = any(name not in OPTIONS for name, value in options.items() if value is not None)
        model, processor, settings, where, images = _embedded(beyond)
    else:
        check_answers(model)
    # Checked by attributes: adapters wrap models.
    if not hasattr(model, "generate") and not hasattr(model, "compute"):
        raise TypeError(f"model must be as mllama.load returns it, got {type(model).__name__}")
    if not hasattr(processor, "chat_template"):
        raise TypeError(
            f"processor must be as mllama.load returns it, got {type(processor).__name__}"
        )
    if not hasattr(model, "generate"):
        return Session(model, processor, settings, where, image_cache=images)
    from mllama.hf.answering import GenerateSession

    return GenerateSession(model, processor)


@functools.cache
def _embedded(by_transformers: bool) -> tuple[Any, Any, Any, str, ImageCache | None]:
    """The embedded model, its processor, settings, files and images, on the core or on
    transformers.
    """
    if by_transformers:
        return *load(), None, str(EMBEDDED), None
    session: Any = open_session()
    say_loaded(None, session.model)
    own = session.model, session.processor, session.settings, session.where
    return *own, session.image_cache


def check_answers(model: Any) -> None:
    """Reject a model without a decoder.

    Raises:
        ValueError: a SigLIP vision model, of this package or of transformers.
    """
    if getattr(getattr(model, "config", None), "model_type", None) == "siglip_vision_model":
        raise ValueError("a SigLIP vision model has no decoder to answer with")


@functools.cache
def _say(line: str) -> None:
    if sys.stderr is not None:  # None if it was closed: print would write to stdout
        print(line, file=sys.stderr)
