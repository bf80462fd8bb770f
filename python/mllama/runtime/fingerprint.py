"""A fingerprint of weights: what files that were computed with them are named after."""

import hashlib
from collections.abc import Iterable

import torch
from torch import nn

from mllama.nn.adapted import AdaptedLinear

_ROW = 4096  # bytes
_PLAIN = (bool, int, float, str, type(None))


def fingerprint(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """32 hexadecimal digits for modules with their names: their classes, settings and tensors.

    Tensors are summed as integers, by rows and by columns of 4096 bytes, and the sums are hashed.
    This reads weights as fast as memory is, a cryptographic hash does not. Any changed value
    changes the fingerprint; two tensors that are made to collide could.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, module in modules:
        for inner, part in module.named_modules(prefix=name):
            digest.update(f"{inner} {type(part).__qualname__} {_settings(part)}".encode())
        for inner, tensor in module.state_dict(prefix=f"{name}.", keep_vars=True).items():
            digest.update(f"{inner} {tensor.dtype} {list(tensor.shape)}".encode())
            for sums in _sums(tensor.detach()):
                digest.update(sums.cpu().numpy())
    return digest.hexdigest()


def _settings(module: nn.Module) -> list:
    """Plain attributes of a module: switches, factors and names. Of an adapter also whether it is
    on, which depends on more.
    """
    plain = [
        (name, value) for name, value in sorted(vars(module).items()) if isinstance(value, _PLAIN)
    ]
    if isinstance(module, AdaptedLinear):
        update = module.update()
        plain.append(("update", None if update is None else update.scale))
    return plain


def _sums(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 sums of a tensor's bytes, as words of 8: by column, by row, and the last bytes."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    whole = len(flat) - len(flat) % _ROW
    words = flat[:whole].view(torch.int64).view(-1, _ROW // 8)
    return words.sum(0), words.sum(1), flat[whole:]
