"""Adapter files by themselves: what is in one, and the same in the other format."""

import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from mllama.checkpoints.files import listing, save_tensors, write_file
from mllama.lora import peft
from mllama.lora.adapters import with_own_names
from mllama.lora.loading import load_lora
from mllama.lora.reading import read_adapters
from mllama.nn.wrappers import unwrapped


def describe_adapter(path: str | os.PathLike) -> dict[str, Any]:
    """What an adapter file, or a PEFT folder, has.

    Returns:
        format ("mllama", "peft" or "pth"); base, the model that it names, or None; layers, their
        number; parameters and bytes of the adapter; dtype, or several; ranks and alphas, each with
        the number of layers; dropout; dora; targets, names of layers with * for numbers; trained,
        names of parameters that were trained in full beside it, and their number of elements.

    Raises:
        FileNotFoundError, ValueError: as `mllama.load_lora`.
    """
    found = read_adapters(Path(path))
    options, tensors = found.options(), found.tensors.values()
    trained = sorted(found.trained.keys() - found.frozen)
    return {
        "format": found.format,
        "base": found.base,
        "layers": len(options),
        "parameters": sum(tensor.numel() for tensor in tensors),
        "bytes": sum(tensor.nbytes for tensor in tensors),
        "dtype": ", ".join(
            sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        ),
        "ranks": _count(each.rank for each in options.values()),
        "alphas": _count(each.alpha for each in options.values()),
        "dropout": found.dropout,
        "dora": any(each.dora for each in options.values()),
        "targets": sorted({re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name) for name in options}),
        "trained": trained,
        "trained_parameters": sum(found.trained[name].numel() for name in trained),
    }


def misfit(model: nn.Module, path: str | os.PathLike) -> str | None:
    """Why an adapter does not fit a model; None if it does, and then the model has it.

    Args:
        model: it may be on the meta device.
        path: as `mllama.load_lora` takes it.

    Raises:
        FileNotFoundError: there is no such file.
    """
    try:
        load_lora(model, path)
    except ValueError as error:
        return str(error)
    return None


def convert_adapter(
    source: str | os.PathLike,
    target: str | os.PathLike,
    format: str,
    model: nn.Module | None = None,
    base: str | None = None,
) -> None:
    """Write an adapter in another format, atomically. Values, ranks and alphas stay the same.

    Args:
        source: as `mllama.load_lora` takes it.
        target: a file for "mllama", a folder for "peft".
        format: "mllama" or "peft".
        model: one that the adapter fits, for the names of its layers; it may be on the meta device.
            "peft" needs it, because its folders name layers as transformers' class does. Default:
            names stay.
        base: folder or hub id of the model, for PEFT's config. Default: what the source names.

    Raises:
        FileNotFoundError, ValueError: as `mllama.load_lora`. ValueError: the file names no alphas;
            "mllama" has no place for whole weights, of modules trained in full or of
            resized embeddings; "peft" without a model.
    """
    found = read_adapters(Path(source))
    if model is not None:
        found = with_own_names(model, found)
    options, target = found.options(), Path(target)
    if format == "peft":
        if model is None:
            raise ValueError("PEFT's format names layers as transformers does: give the model")
        trained = found.trained.keys() - found.frozen
        names = sorted({name.rpartition(".")[0] for name in trained})
        stock_name = getattr(unwrapped(model), "stock_name", str)
        own_base = base or found.base
        peft.write(target, options, found.tensors, found.trained, names, stock_name, own_base)
        return
    if found.trained:
        raise ValueError(
            f"mllama's format has no place for {listing(sorted(found.trained))}, which {source} "
            "has in full: merge them into the model, or keep PEFT's format"
        )
    alphas = json.dumps({name: float(each.alpha) for name, each in options.items()})
    write_file(target, lambda aside: save_tensors(aside, found.tensors, alpha=alphas))


def _count(values: Iterable[float]) -> dict[str, int]:
    """How often each value occurs, by its text, from the smallest."""
    found = sorted(values)
    return {f"{value:g}": found.count(value) for value in dict.fromkeys(found)}
