"""Models from checkpoints: laid out on the meta device, filled one tensor at a time."""

import os
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from mllama.checkpoints.loading import Report, load_weights, match
from mllama.checkpoints.opened import Opened
from mllama.checkpoints.opening import open_checkpoint
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
    """Build a model from a folder or file, in eval mode. It is laid out on the meta device first,
    so memory holds its weights once.

    Args:
        path: what `open_checkpoint` takes. The headers of its files are read first: they bound
            what is built.
        build: makes the module of a spec; its parameters have this package's names.
        dtype: "auto" is the files' own (the one most of their elements have); or float32, bfloat16,
            float16.
        device: where the weights go.

    Returns:
        The module, and what was opened, its files closed: config, spec, family, generation.

    Raises:
        FileNotFoundError: no such folder, no config.json, no weights.
        ValueError: an unknown model_type, a broken file, a config that cannot be, weights that do
            not fit (every name in one error), a dtype or device that is none.
    """
    dtype, device = dtype_named(dtype), choose_device(device)
    with (opened := open_checkpoint(path)).source:
        model = lay_out(opened, build)
        fill(model, opened, dtype, lambda name: device)
    return model.eval(), opened


def lay_out(opened: Opened, build: Callable[[ModelSpec], _Model]) -> _Model:
    """The model that opened files are of, on the meta device: names and shapes without values.

    Raises:
        ValueError: sizes that cannot be, or that the files are too small for.
    """
    check_layers(opened)
    try:
        with torch.device("meta"), _WithoutInit():
            return build(opened.spec)
    except (RuntimeError, OverflowError) as error:
        # Of sizes that are each in range, whose product is not.
        raise ValueError(
            f"{opened.source.where}: no model of these sizes can be laid out: {error}"
        ) from error


class _WithoutInit(TorchFunctionMode):
    """Leaves parameters as they are: on the meta device torch's normal_ is a reference in Python
    that imports its compiler, which takes longer than everything else here.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))


def survey(opened: Opened, build: Callable[[ModelSpec], _Model]) -> tuple[_Model, Report]:
    """`lay_out`, and what the files have for that model: from headers alone, no tensor is read.

    Raises:
        ValueError: as `lay_out`.
    """
    model = lay_out(opened, build)
    headers = opened.source.headers()
    return model, match(model.state_dict(), headers, opened.weight_map, tied_names(opened.spec))


def fill(
    model: nn.Module,
    opened: Opened,
    dtype: torch.dtype | None = None,
    device_of: Callable[[str], torch.device | str] = lambda name: "cpu",
    strict: bool = True,
) -> Report:
    """Put opened files' tensors into a model that was laid out.

    Args:
        dtype: None is the one that most of the files' elements have.
        device_of: where the model's tensor of a name goes.
        strict: False loads what fits; the rest of the model stays on the meta device.

    Raises:
        ValueError: as `load_weights`; files that were written to meanwhile.
    """
    tied = tied_names(opened.spec)
    report = load_weights(model, opened.source, opened.weight_map, dtype, device_of, tied, strict)
    # Shards are opened one after the other: some would be of one model, some of another.
    if opened.changed():
        raise ValueError(
            f"the weights in {opened.source.where} were written anew while they were read: load "
            "them again"
        )
    for name, other in tied.items():
        if name not in report.lacking:
            _tie(model, name, other)
    return report


def tied_names(spec: ModelSpec) -> dict[str, str]:
    """Parameters that are another one: {name: the other's}."""
    return {_HEAD: _EMBEDDINGS} if spec.text is not None and spec.text.tie_word_embeddings else {}


def _tie(model: nn.Module, name: str, other: str) -> None:
    owner, _, last = name.rpartition(".")
    setattr(model.get_submodule(owner), last, model.get_parameter(other))


def check_layers(opened: Opened) -> None:
    """Before layers are built: every one needs tensors of its own, so the files bound their number.

    Raises:
        ValueError: more layers than tensors.
    """
    where, tensors = opened.source.where, len(opened.source.headers())
    for part in ("text", "vision"):
        spec: Any = getattr(opened.spec, part)
        for name in _COUNTS:
            if (count := getattr(spec, name, 0)) > tensors:
                raise ValueError(
                    f"{where}: {part}_config: {name} is {count}, the weights hold {tensors} "
                    "tensors in all"
                )
