"""What engines on torch share where their device is not the CPU, or their weights are no file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

TILE_TABLES = ("tile_positional_embedding.embedding.weight", "tile_embedding.weight")


def has_weights(model: str) -> bool:
    """Whether a path is more than a folder with a config."""
    path = Path(model)
    return not path.is_dir() or any(path.glob("*.safetensors"))


def random_weights(make: Callable[[], nn.Module], device: torch.device, dtype: torch.dtype) -> Any:
    """A model made on its device and in its dtype, so that the largest one takes seconds."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device), torch.no_grad():
            model = make()
            for name, parameter in model.named_parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0, 0.02)
                elif "norm" in name and name.endswith("weight"):
                    parameter.fill_(1)
                if name.endswith(TILE_TABLES):
                    parameter.copy_(without_empty_tiles(parameter, model.config.vision_config))
    finally:
        torch.set_default_dtype(before)
    return model


def without_empty_tiles(table: torch.Tensor, vision: Any) -> torch.Tensor:
    """A table [aspect ratios, tiles * size] that is zero for tiles which an aspect ratio does not
    have, as Meta's weights are: on other weights the exact savings of empty tiles do not exist.
    """
    kept = torch.zeros_like(table, memory_format=torch.contiguous_format)
    size = table.shape[1] // vision.max_num_tiles
    for ratio, (rows, columns) in enumerate(vision.supported_aspect_ratios, start=1):
        kept[ratio, : rows * columns * size] = table[ratio, : rows * columns * size]
    return kept


def with_memory(actions: dict[str, Callable], device: torch.device) -> dict[str, Callable]:
    """Actions that tell the most memory of a GPU that each takes, in GB, too."""
    if device.type != "cuda":
        return actions

    def measured(action: Callable) -> Callable:
        def run(**arguments: Any) -> dict:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            found = action(**arguments)
            peak = torch.cuda.max_memory_allocated() / 1e9
            return found | {"more": found.get("more", {}) | {"gpu_peak_gb": peak}}

        return run

    return {name: measured(action) for name, action in actions.items()}


def wait_for(device: torch.device) -> None:
    """Wait until a device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize()
