"""`mllama lora merge|convert|inspect`: LoRA adapters in files."""

import argparse
import json
from pathlib import Path
from typing import Any

from mllama.api import find_model
from mllama.checkpoints import open_checkpoint
from mllama.checkpoints.files import check_free
from mllama.device import dtype_name
from mllama.hf.checkpoints import load_opened
from mllama.hf.models import model_class, survey_opened
from mllama.hf.names import PreTrainedModel
from mllama.hf.processors.auto import processor_to_write, write_both
from mllama.lora.files import convert_adapter, describe_adapter, misfit
from mllama.lora.loading import load_lora
from mllama.lora.state import merge_and_unload


def run(arguments: argparse.Namespace) -> int:
    """Run the task; exit code 1 if `inspect` finds that the adapter does not fit the model."""
    task = {"merge": _merge, "convert": _convert, "inspect": _inspect}[arguments.task]
    return task(arguments)


def merge(
    model: str, adapter: str, target: Path, dtype: str = "auto", force: bool = False
) -> PreTrainedModel:
    """Write a model's folder, with its processor, with an adapter merged into the weights.

    Returns:
        The merged model.

    Raises:
        FileExistsError: target is not empty, without `force`.
        FileNotFoundError, ValueError: as loading the model and `mllama.load_lora`; the model's
            weights are packed; target is a file.
    """
    check_free(target, force)
    source = find_model(model)
    with (opened := open_checkpoint(source)).source:
        if opened.packing is not None:
            raise ValueError(
                f"{source} has packed weights, which take no adapter: give the model that they "
                "were packed from"
            )
        merged, _ = load_opened(model_class(opened.spec), opened, dtype)
    processor = processor_to_write(source)
    load_lora(merged, adapter)
    merge_and_unload(merged)
    write_both(target, merged, processor)
    return merged


def _merge(arguments: argparse.Namespace) -> int:
    target = Path(arguments.target)
    merged = merge(arguments.model, arguments.adapter, target, arguments.dtype, arguments.force)
    kind, dtype = merged.config.model_type, dtype_name(merged.dtype)
    shown = {"folder": str(target), "family": kind, "dtype": dtype, "adapter": arguments.adapter}
    _print(arguments, shown, f"{target}: the {kind} in {dtype} with {arguments.adapter} merged")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    target, is_folder = Path(arguments.target), arguments.to == "peft"
    check_free(target, arguments.force, None if is_folder else ".safetensors")
    if is_folder and arguments.model is None:
        raise ValueError("--to peft needs --model: PEFT's format has transformers' names of layers")
    model = None if arguments.model is None else _laid_out(arguments.model)
    if model is not None:
        load_lora(model, arguments.source)  # raises if it does not fit
        model = _laid_out(arguments.model)
    convert_adapter(arguments.source, target, arguments.to, model, arguments.model)
    shown = {"path": str(target), "to": arguments.to} | describe_adapter(target)
    _print(arguments, shown, f"{target}: {shown['layers']} layers in {arguments.to}'s format")
    return 0


def _inspect(arguments: argparse.Namespace) -> int:
    found = {"path": arguments.source} | describe_adapter(arguments.source)
    fits, problem = None, None
    if arguments.model is not None:
        problem = misfit(_laid_out(arguments.model), arguments.source)
        fits = problem is None
    shown = found | {"model": arguments.model, "fits": fits, "problem": problem}
    _print(arguments, shown, _page(shown))
    return 1 if fits is False else 0


def _laid_out(model: str) -> PreTrainedModel:
    """A model on the meta device: names and shapes."""
    with (opened := open_checkpoint(find_model(model))).source:
        return survey_opened(opened)[0]


def _page(found: dict[str, Any]) -> str:
    kind = "DoRA" if found["dora"] else "LoRA"
    lines = [
        f"{found['path']}: {kind} in {found['format']}'s format, base model "
        f"{found['base'] or 'not named'}",
        f"{found['layers']} layers, {found['parameters']:,} parameters, {found['bytes']:,} bytes "
        f"in {found['dtype']}",
        *(
            f"{name}: " + ", ".join(f"{value} ({count})" for value, count in found[name].items())
            for name in ("ranks", "alphas")
        ),
        f"dropout: {found['dropout']:g}",
        "targets:",
        *(f"  {name}" for name in found["targets"]),
    ]
    if found["trained"]:
        lines += [f"trained in full, {found['trained_parameters']:,} parameters:"]
        lines += [f"  {name}" for name in found["trained"]]
    if found["fits"] is not None:
        fits = "fits" if found["fits"] else f"does not fit: {found['problem']}"
        lines.append(f"{found['model']}: {fits}")
    return "\n".join(lines)


def _print(arguments: argparse.Namespace, shown: dict[str, Any], page: str) -> None:
    print(json.dumps(shown) if arguments.json else page)
