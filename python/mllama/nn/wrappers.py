"""Wrappers (torch.compile, DDP, FSDP, activation checkpointing): names without the wrappers' parts,
and full tensors of sharded parameters.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import distributed, nn

_PARTS = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside the wrappers around it."""
    while (
        part := next((name for name in module._modules if _wraps(module, name)), None)
    ) is not None:
        module = module._modules[part]
    return module


def plain_name(module: nn.Module, name: str) -> str:
    """The dotted name of a module or parameter, without the wrappers' parts."""
    parts = []
    for part in name.split(".") if name else ():
        if part not in module._modules:  # a parameter, or FSDP omitted its own part
            module = unwrapped(module)
        if not _wraps(module, part):
            parts.append(part)
        module = module._modules.get(part, module)
    return ".".join(parts)


def plain_key(key: str) -> str:
    """`plain_name` for a state dict's key, without its modules."""
    parts = [part for part in key.split(".") if part not in _PARTS]
    while len(parts) > 1 and parts[0] == "module":
        parts = parts[1:]
    return ".".join(parts)


def _wraps(module: nn.Module, part: str) -> bool:
    return part in _PARTS or (
        part == "module"
        and isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    )


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, gathered if it is sharded (`fully_shard`); every process must call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def put(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """Copy values into a tensor; each process copies its part into a sharded one. Values may be
    sharded in the same way.
    """
    if hasattr(tensor, "full_tensor") and not hasattr(value, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor  # slow to import

        value = distribute_tensor(
            value.to(tensor.device, tensor.dtype), tensor.device_mesh, tensor.placements
        )
    tensor.copy_(value)


def given_out(module: nn.Module, state_dict: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A state dict as the module holds it: full tensors, or this process's shards."""
    own = dict(module.named_parameters(remove_duplicate=False))
    placed = {}
    for name, tensor in state_dict.items():
        here, there = (hasattr(one, "full_tensor") for one in (own.get(name), tensor))
        if here and not there:
            placed[name] = torch.empty_like(own[name])
            put(placed[name], tensor)
        else:
            placed[name] = whole(tensor) if there and not here else tensor
    return placed


def is_sharded(module: nn.Module) -> bool:
    """Whether parameters are sharded; all processes must then take part in reads and writes."""
    return bool(_flat_roots(module)) or any(
        hasattr(parameter, "full_tensor") for parameter in module.parameters()
    )


def may_write(module: nn.Module) -> bool:
    """Whether this process writes files: the first one if the module is sharded."""
    return not is_sharded(module) or distributed.get_rank() == 0


@contextmanager
def gathered(module: nn.Module, write: bool = False) -> Iterator[None]:
    """Context in which FSDP's flat parameters are gathered; with `write`, changes to them stay. At
    exit, also after an error, all processes of a sharded module wait for each other, so that files
    written by one are visible to all.
    """
    sharded = is_sharded(module)
    try:
        if roots := _flat_roots(module):
            with _summoned(roots, write):
                yield
        else:
            yield
    finally:
        if sharded:
            distributed.barrier()


@contextmanager
def _summoned(roots: list[nn.Module], write: bool) -> Iterator[None]:
    if not roots:
        yield
        return
    with type(roots[0]).summon_full_params(roots[0], writeback=write), _summoned(roots[1:], write):
        yield


def _flat_roots(module: nn.Module) -> list[nn.Module]:
    """The outermost FSDP1 modules."""
    if not distributed.is_available() or not distributed.is_initialized():
        return []
    from torch.distributed.fsdp import FullyShardedDataParallel

    return FullyShardedDataParallel.fsdp_modules(module, root_only=True)
