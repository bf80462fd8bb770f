"""Shares a model's weights out among processes (FSDP2)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import distributed, nn

from mllama.nn.checkpointing import CheckpointedLayer
from mllama.quant.packer import packing_of


def shard(model: nn.Module, device: torch.device) -> None:
    """Shard each layer of decoder and encoder, and the rest as one, over all processes. A layer is
    gathered while it computes.

    Args:
        model: on the CPU, so that no device has to hold all of it.
        device: where this process's share goes.

    Raises:
        ValueError: the model has packed weights, which are no parameters.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    if packing_of(model) is not None:
        raise ValueError("shard: packed weights cannot be shared out; each process has all of them")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, CheckpointedLayer):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


@contextmanager
def without_sync(model: Any) -> Iterator[None]:
    """Gradients of a sharded model stay in their process, for a later pass to sum."""
    model.set_requires_gradient_sync(False)
    try:
        yield
    finally:
        model.set_requires_gradient_sync(True)
