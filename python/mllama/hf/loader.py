"""`load_hf_model`, a lenient loader: prints a report and ignores unused tensors."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mllama.checkpoints.files import CONFIG, listing
from mllama.checkpoints.hub import find_folder
from mllama.checkpoints.loading import Report
from mllama.checkpoints.opening import open_checkpoint
from mllama.device import dtype_name
from mllama.hf.checkpoints import load_opened
from mllama.hf.config_objects import compose, config_object
from mllama.hf.modeling import MllamaForConditionalGeneration
from mllama.hf.models import model_class
from mllama.hf.processors.auto import load_processor
from mllama.hf.processors.folders import load_tokenizer
from mllama.processing.tokenizer import Tokenizer


def load_hf_model(
    model_path: str | os.PathLike, device: str | torch.device = "cpu", strict: bool = False
) -> tuple[MllamaForConditionalGeneration | Any, PreTrainedTokenizerBase | Tokenizer]:
    """Load a model and its tokenizer, and print which tensors were converted, tied, skipped and
    missing.

    Args:
        model_path: anything `MllamaForConditionalGeneration.from_pretrained` takes, or a SigLIP's
            folder.
        device: device of the weights.
        strict: raise if the files do not fit the model. Otherwise tensors with unknown names or
            wrong shapes are skipped, a missing output head is tied to the embeddings, and other
            missing tensors are initialized.

    Returns:
        The model, in eval mode, and the tokenizer.

    Raises:
        FileNotFoundError: there is no such model, or it has no tokenizer files.
        ValueError: files are broken; with `strict`, tensors are missing, unexpected, repeated or
            have a wrong shape (one error lists all).
    """
    return load_as(lambda config: model_class(compose(config)), model_path, device, strict)


def load_as(
    class_of: Callable[[PretrainedConfig], type[PreTrainedModel]],
    model_path: str | os.PathLike,
    device: str | torch.device,
    strict: bool,
) -> tuple[MllamaForConditionalGeneration | Any, PreTrainedTokenizerBase | Tokenizer]:
    """`load_hf_model` with the class that `class_of` returns for the model's config."""
    path = find_folder(model_path)
    with (opened := open_checkpoint(path)).source:
        tokenizer = _tokenizer(path)  # before the weights, so that errors come at once
        config = config_object(opened.config)
        model, report = load_opened(
            class_of(config), opened, device=device, strict=strict, config=config
        )
    if report.lacking:
        for name, other in (model._tied_weights_keys or {}).items():
            if name in report.lacking and other not in report.lacking:
                model.config.tie_word_embeddings = True
                report.lacking.remove(name)
        model.tie_weights(recompute_mapping=True)
        _initialize(model, torch.device(device), report.dtype)
        model.tie_weights(recompute_mapping=True)
    print(
        "\n".join(
            _lines(
                opened.family.name,
                opened.source.where,
                report,
                model.get_expanded_tied_weights_keys(),
            )
        )
    )
    return model, tokenizer


def _initialize(model: PreTrainedModel, device: torch.device, dtype: torch.dtype) -> None:
    """Initialize parameters that are still on the meta device with the model's own initialization,
    or zeros if it has none.
    """
    for module in model.modules():
        own = dict(module.named_parameters(recurse=False))
        if not any(parameter.is_meta for parameter in own.values()):
            continue
        for name, parameter in own.items():
            if parameter.is_meta:
                setattr(
                    module,
                    name,
                    torch.nn.Parameter(torch.zeros(parameter.shape, dtype=dtype, device=device)),
                )
        loaded = {
            name: parameter.detach().clone()
            for name, parameter in own.items()
            if not parameter.is_meta
        }
        with torch.no_grad():
            model._init_weights(module)
            for name, value in loaded.items():
                getattr(module, name).copy_(value)


def _lines(family: str, where: str, report: Report, tied: dict[str, str]) -> list[str]:
    converted = sum(len(move.theirs) for move in report.moves)
    lines = [f"converted: {converted} tensors of {where} ({family}), {dtype_name(report.dtype)}"]
    lines += [
        f"tied: {name} is {other}" for name, other in tied.items() if name not in report.lacking
    ]
    for what, names in (
        ("skipped, of unknown names", report.unexpected),
        ("skipped, of another shape or kind", report.unfit),
        ("skipped, given twice", report.twice),
        ("missing, newly initialized", report.lacking),
    ):
        if names:
            lines.append(f"{what} ({len(names)}): {listing(names)}")
    return lines


def _tokenizer(path: Path) -> PreTrainedTokenizerBase | Tokenizer:
    """The tokenizer in a Hugging Face folder; older scripts have a processor of their own."""
    if not (path / CONFIG).exists():
        processor: Any = load_processor(path)
        return getattr(processor, "tokenizer", processor)
    try:
        return load_tokenizer(path)
    except FileNotFoundError:
        raise
    except OSError as error:
        raise FileNotFoundError(
            f"{path} holds no tokenizer that can be read: {str(error).splitlines()[0]}"
        ) from error
