"""Models from checkpoints: built on the meta device, then filled one tensor at a time."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mllama.checkpoints.loading import Report, load_weights, match
from mllama.checkpoints.opened import Opened
from mllama.checkpoints.opening import open_checkpoint
from mllama.checkpoints.sources import Taker
from mllama.config.spec import ModelSpec
from mllama.device import choose_device, dtype_named

_Model = TypeVar("_Model", bound=nn.Module)
_COUNTS = ("num_hidden_layers", "num_global_layers")
_HEAD, _EMBEDDINGS = "lm_head.weight", "language_model.embed_tokens.weight"


def load(
    path: str | os.PathLike,
    build: Callable[[ModelSpec], _Model],
    dtype: torch.dtype | str = "auto",
    device: torch.device | str = "cpu",
) -> tuple[_Model, Opened]:
    """Build a model from a folder or file, in eval mode. It is built on the meta device first, so
    weights are in memory once.

    Args:
        path: as `open_checkpoint` takes it. The headers of its files are read first and bound what
            is built.
        build: builds the module of a spec; its parameters have this package's names.
        dtype: "auto" is the dtype of most of the files' elements; or float32, bfloat16, float16.
        device: device of the weights.

    Returns:
        The module, and what was opened, with its files closed: config, spec, family, generation.

    Raises:
        FileNotFoundError: the folder, config.json or the weights do not exist.
        ValueError: the model_type is unknown, a file is broken, the config is invalid, weights do
            not fit (one error has every name), or the dtype or device is invalid.
    """
    dtype, device = dtype_named(dtype), choose_device(device)
    with (opened := open_checkpoint(path)).source:
        model = lay_out(opened, build)
        fill(model, opened, dtype, lambda name: device)
    return model.eval(), opened


def lay_out(opened: Opened, build: Callable[[ModelSpec], _Model]) -> _Model:
    """Build the model of opened files on the meta device: names and shapes without values.

    Raises:
        ValueError: sizes are invalid, or too large for the files.
    """
    check_layers(opened)
    try:
        with torch.device("meta"), _WithoutInit():
            return build(opened.spec)
    except (RuntimeError, OverflowError) as error:
        # Sizes may be valid one by one but not as a product.
        raise ValueError(
            f"{opened.source.where}: no model of these sizes can be laid out: {error}"
        ) from error


class _WithoutInit(TorchFunctionMode):
    """Skips initialization: on the meta device torch's normal_ is a Python reference that imports
    the compiler, which takes longer than everything else here.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def survey(opened: Opened, build: Callable[[ModelSpec], _Model]) -> tuple[_Model, Report]:
    """`lay_out`, and the report of matching the files with the model, from headers alone.

    Raises:
        ValueError: as `lay_out`.
    """
    model = lay_out(opened, build)
    headers = opened.source.headers()
    return model, match(model.state_dict(), headers, opened.weight_map, _tied_in(opened))


def fill(
    model: nn.Module,
    opened: Opened,
    dtype: torch.dtype | None = None,
    device_of: Callable[[str], torch.device | str] = lambda name: "cpu",
    strict: bool = True,
    take: Taker | None = None,
    mapped: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Load opened files' tensors into a model that `lay_out` built.

    Args:
        dtype: Default: the dtype of most of the files' elements.
        device_of: device of each of the model's tensors, by name.
        strict: False loads what fits; the rest of the model stays on the meta device.
        take, mapped, progress: as `load_weights` takes them.

    Raises:
        ValueError: as `load_weights`; or files changed since they were opened.
    """
    tied = _tied_in(opened)
    report = load_weights(
        model,
        opened.source,
        opened.weight_map,
        dtype,
        device_of,
        tied,
        strict,
        take,
        mapped,
        progress,
    )
    # Shards are opened one after the other: they could belong to different models.
    if opened.changed():
        raise ValueError(
            f"the weights in {opened.source.where} were written anew while they were read: load "
            "them again"
        )
    for name, other in tied.items():
        if name not in report.lacking and other in dict(model.named_parameters()):
            _tie(model, name, other)
    return report


def tied_names(spec: ModelSpec) -> dict[str, str]:
    """Tied parameters: {name: the other's name}."""
    return {_HEAD: _EMBEDDINGS} if spec.text is not None and spec.text.tie_word_embeddings else {}


def _tied_in(opened: Opened) -> dict[str, str]:
    """`tied_names`, for packed files of what a packed layer has in place of its weight."""
    tied = tied_names(opened.spec)
    if opened.packing is None:
        return tied
    return {
        name.replace("weight", last): other.replace("weight", last)
        for name, other in tied.items()
        for last in ("packed", "format")
    }


def _tie(model: nn.Module, name: str, other: str) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, model.get_parameter(other))


def check_layers(opened: Opened) -> None:
    """Check the number of layers before building them: each needs its own tensors, so the files
    bound it.

    Raises:
        ValueError: there are more layers than tensors.
    """
    where, tensors = opened.source.where, len(opened.source.headers())
    for part in ("text", "vision"):
        spec: Any = getattr(opened.spec, part)
        for name in _COUNTS:
            if (count := getattr(spec, name, 0)) > tensors:
                raise ValueError(
                    f"{where}: {part}_config: {name} is {count}, the weights have {tensors} "
                    "tensors in all"
                )
