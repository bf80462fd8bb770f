"""Hashes of tensors, fingerprints of weights, and what modules run beside their weights."""

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mllama.nn.plain import HOOKS_OF_ALL

_ROW = 4096  # bytes
_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
_KNOWN = ("torch.", "mllama.")  # whose changes are counted, or do not matter
_BASES = (*_KNOWN, "transformers.", "builtins")  # of this package's classes


def fingerprint(modules: Iterable[tuple[str, nn.Module]]) -> str:
    """32 hexadecimal digits for modules with their names: their classes, settings and tensors.

    Tensors are summed as integers, by rows and by columns of 4096 bytes, and the sums are hashed:
    this reads weights as fast as memory is, a cryptographic hash of all bytes does not. A changed
    value changes the fingerprint; tensors could be made to have the same one.
    """
    digest = hashlib.blake2b(digest_size=16)
    for name, module in modules:
        for inner, part in module.named_modules(prefix=name):
            digest.update(f"{inner} {type(part).__qualname__} {_settings(part)}".encode())
            for own in (part.named_parameters, part.named_buffers):
                for label, tensor in own(recurse=False):
                    digest.update(f"{label} {tensor.dtype} {list(tensor.shape)}".encode())
                    for sums in _sums(tensor.detach()):
                        digest.update(sums.cpu().numpy())
    return digest.hexdigest()


def structure(modules: Iterable[nn.Module]) -> tuple:
    """What calls of modules run beside their weights: which modules these are, with all in them;
    their classes, hooks and overridden forwards; hooks of all modules; and the switches of other
    libraries' layers, such as PEFT's. To be compared with another one; equal ones are of the same
    objects.
    """
    found: list[Any] = [tuple(key for hooks in HOOKS_OF_ALL for key in hooks)]
    for part in (inner for module in modules for inner in module.modules()):
        own = vars(part)
        # Ids of hooks are never used again, those of objects are: a reference is of one object.
        hooks = [key for name in _HOOKS for key in own[name]]
        switches = str(_settings(part)) if is_foreign(part) else ""
        kind, forward = type(part), id(own.get("forward"))
        found.append((weakref.ref(part), kind, tuple(hooks), forward, switches))
    return tuple(found)


def is_foreign(module: nn.Module) -> bool:
    """Whether it is another library's module than torch's or this one's, or this one's version of
    such a module.
    """
    own, *bases = (kind.__module__ for kind in type(module).__mro__)
    return not own.startswith(_KNOWN) or not all(base.startswith(_BASES) for base in bases)


def traces(modules: Iterable[nn.Module]) -> tuple | None:
    """What `fingerprint` depends on, without reading a value: modules' settings, and `versions`. To
    be compared with an earlier one of modules with the same `structure`. None if they have tensors
    of inference mode, whose writes torch does not count.
    """
    found: list[Any] = []
    for module in modules:
        if any(x.is_inference() for x in (*module.parameters(), *module.buffers())):
            return None
        found.append((versions(module), str([_settings(part) for part in module.modules()])))
    return tuple(found)


def versions(module: nn.Module) -> tuple:
    """Where a module's parameters and buffers are in memory, and how often they were written to."""
    tensors = (*module.parameters(), *module.buffers())
    return tuple((x.data_ptr(), 0 if x.is_inference() else x._version) for x in tensors)


def hash_tensors(start: bytes, tensors: Mapping[str, torch.Tensor]) -> bytes:
    """32 bytes: a hash of `start` and of tensors with their names, dtypes and shapes."""
    digest = hashlib.blake2b(start, digest_size=32)
    for name, tensor in tensors.items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)} ".encode())
        digest.update(tensor.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def _settings(module: nn.Module) -> list[tuple[str, Any]]:
    """A module's own attributes that are switches, factors or names, by name."""
    return sorted(item for item in vars(module).items() if _is_plain(item[1]))


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
