"""Models that do not fit a GPU: the last layers of their decoder stay on the host."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from mllama.nn.offload import CudaStreams, LayerOffload, Streams

LAYERS = "language_model.layers"


def check_gpu_layers(gpu_layers: int | None, device: torch.device, has_decoder: bool) -> None:
    """Check a number of layers whose weights are to stay on a device.

    Raises:
        TypeError: it is not an int or None.
        ValueError: it is negative; the device is none of CUDA's; there is no decoder.
    """
    if gpu_layers is None:
        return
    if isinstance(gpu_layers, bool) or not isinstance(gpu_layers, int):
        raise TypeError(f"gpu_layers must be an int or None, got {type(gpu_layers).__name__}")
    if gpu_layers < 0:
        raise ValueError(f"gpu_layers must be at least 0, got {gpu_layers}")
    if device.type != "cuda":
        raise ValueError(f"gpu_layers needs a CUDA device, got {str(device)!r}")
    if not has_decoder:
        raise ValueError("gpu_layers must be None: the model has no decoder")


def device_of_each(
    model: Any, gpu_layers: int | None, device: torch.device
) -> Callable[[str], torch.device]:
    """Where a model's tensors and modules are to be loaded, by name, for `offload` later."""
    if gpu_layers is None:
        return lambda name: device
    kept = _kept(model)
    first = {f"{LAYERS}.{index}" for index in range(gpu_layers)}
    of_images = {name for name, module in model.named_modules() if module in kept}

    def device_of(name: str) -> torch.device:
        parts = name.split(".")
        owners = {".".join(parts[:end]) for end in range(1, len(parts) + 1)}
        on_host = name.startswith(f"{LAYERS}.") and owners.isdisjoint(first | of_images)
        return torch.device("cpu") if on_host else device

    return device_of


def offload(
    model: Any,
    gpu_layers: int | None,
    device: torch.device,
    streams_of: Callable[[torch.device], Streams] = CudaStreams,
) -> None:
    """Keep the weights of all decoder layers but the first ones in pinned memory of the host, from
    where each is copied while the layer before it computes. What only images pass, such as the
    projections to their keys, stays on the device.

    Args:
        model: a `VisionLanguageModel`, loaded as `device_of_each` says, without gradients.
        gpu_layers: number of layers whose weights stay on the device; None: all.
        device: where the model computes.
        streams_of: makes the streams.
    """
    if gpu_layers is None:
        return
    rest = list(model.language_model.layers)[gpu_layers:]
    if rest:
        LayerOffload(rest, device, streams_of(device), _kept(model))


def _kept(model: Any) -> set[nn.Module]:
    return {part for _, module in model.image_modules() for part in module.modules()}
