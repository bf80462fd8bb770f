"""Hashes of tensors, and a fingerprint of weights, which files computed with them are named after."""

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

_ROW = 4096  # bytes


def fingerprint(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """32 hexadecimal digits for modules with their names: their classes, settings and tensors.

    Tensors are summed as integers, by rows and by columns of 4096 bytes, and the sums are hashed:
    this reads weights as fast as memory is, a cryptographic hash of all bytes does not. A changed
    value changes the fingerprint; tensors could be made to have the same one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, module in modules:
        for inner, part in module.named_modules(prefix=name):
            settings = [item for item in sorted(vars(part).items()) if _is_plain(item[1])]
            digest.update(f"{inner} {type(part).__qualname__} {settings}".encode())
            for own in (part.named_parameters, part.named_buffers):
                for label, tensor in own(recurse=False):
                    digest.update(f"{label} {tensor.dtype} {list(tensor.shape)}".encode())
                    for sums in _sums(tensor.detach()):
                        digest.update(sums.cpu().numpy())
    return digest.hexdigest()


def hash_tensors(start: bytes, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """32 bytes: a hash of `start` and of tensors with their names, dtypes and shapes."""
    digest = hashlib.blake2b(start, digest_size=32)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def _is_plain(value: Any) -> bool:
    """Whether a module's attribute is a switch, a factor, a name, or several of them."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value)) and all(map(_is_plain, value.values()))
    return isinstance(value, (bool, int, float, str, type(None)))


def _sums(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """int64 sums of a tensor's bytes, as words of 8: by column, by row, and the last bytes."""
    flat = tensor.contiguous().flatten().view(torch.uint8)
    whole = len(flat) - len(flat) % _ROW
    words = flat[:whole].view(torch.int64).view(-1, _ROW // 8)
    return words.sum(0), words.sum(1), flat[whole:]
