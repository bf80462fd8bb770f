"""The core's model of opened files."""

import functools

import torch

from mllama.checkpoints.models import fill, lay_out
from mllama.checkpoints.opened import Opened
from mllama.model.model import VisionLanguageModel
from mllama.model.offload import device_of_each
from mllama.quant.loading import lay_out_packed, packing
from mllama.runtime.progress import Progress, loading
from mllama.weights.stock_names import own_names


def load_core(
    opened: Opened,
    dtype: torch.dtype | None,
    device: torch.device,
    reference: str = "meta",
    weights: str | None = None,
    progress: Progress | None = None,
    gpu_layers: int | None = None,
) -> VisionLanguageModel:
    """Load a model without transformers, in eval mode.

    Args:
        opened: its files.
        dtype: of the weights. Default: the files'.
        device: where they go.
        reference: as `mllama.load` takes it.
        weights: pack them, as `mllama.load` takes it.
        progress: called with the stage "load", the parameters loaded so far, and all of them.
        gpu_layers: as `mllama.load` takes it; the caller calls `offload` on the complete model.

    Raises:
        ValueError: as `lay_out`, `fill` and `Packer`.
    """
    model = lay_out(opened, lambda spec: VisionLanguageModel(spec, reference=reference))
    if opened.packing is not None:
        lay_out_packed(model, opened.source)
    device_of = device_of_each(model, gpu_layers, device)
    with packing(model, weights, device, opened.packing, device_of) as take:
        fill(model, opened, dtype, device_of, take=take, progress=loading(progress))
    # load_lora asks for it, of adapters under transformers' names.
    weight_map = opened.family.weight_map(opened.spec)
    model.__dict__["own_names"] = functools.partial(own_names, weight_map)
    return model.eval()
