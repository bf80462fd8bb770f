"""A run's model without its weights: on the meta device, adapted and packed as the settings say."""

from typing import Any

import torch
from torch import nn

from mllama.api import find_model
from mllama.checkpoints import open_checkpoint
from mllama.device import choose_device, dtype_named
from mllama.hf.models import survey_opened
from mllama.hf.processors.auto import load_processor
from mllama.processing.auto import processor_of
from mllama.quant.packer import Packer
from mllama.train.prepare import make_trainable
from mllama.train.settings import TrainSettings


def lay_out_model(settings: TrainSettings) -> tuple[Any, Any]:
    """`prepare_model` without reading a weight. Returns (model, processor).

    Raises:
        TypeError, ValueError, FileNotFoundError: as `prepare_model`; weights is "file".
    """
    if settings.weights == "file":
        raise ValueError("weights: file depends on the file's blocks, which a plan does not read")
    folder = find_model(settings.model)
    with (opened := open_checkpoint(folder)).source:
        model, report = survey_opened(opened)
        named = opened.resolve_dtype(settings.dtype, choose_device(settings.device))
    dtype = dtype_named(named) or report.dtype
    _cast(model, dtype)
    if settings.weights is not None and opened.packing is None:
        packer = Packer(model, settings.weights, "cpu", lambda name: "meta")
        packer.lay_out(dtype)
        packer.finish()
    make_trainable(model, settings, quiet=True)
    return model, processor_of(folder, load_processor)


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Give what files have the dtype that it is loaded in."""
    for tensor in model.state_dict(keep_vars=True).values():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
