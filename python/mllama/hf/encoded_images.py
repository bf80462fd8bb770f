"""Images that `mllama.ask` encoded for a model, kept from call to call."""

import weakref
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from mllama.nn.plain import all_plain
from mllama.runtime.fingerprint import fingerprint
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.images import ImageReader
from mllama.runtime.session import OPTIONS

_MAX_BYTES = 2**27  # of each model that was asked
_PLAIN = (torch.Tensor, nn.Parameter)  # other tensors are another library's

_caches: "weakref.WeakKeyDictionary[nn.Module, tuple[str, ImageCache]]"
_caches = weakref.WeakKeyDictionary()


def encode_once(
    model: Any, inputs: Mapping[str, torch.Tensor], options: Collection[str]
) -> dict[str, torch.Tensor]:
    """The inputs of `generate` with image features in place of pixels, where that changes nothing:
    the model is this package's, its encoder has no hooks, and a session has all options.

    Models are trained between calls, so their encoder's weights are looked at each time.
    """
    given = dict(inputs)
    if "pixel_values" not in given or not hasattr(model, "image_modules"):
        return given
    modules = dict(model.encoder_modules())
    parts = [part for module in modules.values() for part in module.modules()]
    tensors = [
        tensor
        for part in parts
        for own in (part.parameters, part.buffers)
        for tensor in own(recurse=False)
    ]
    if (
        not OPTIONS.issuperset(options)
        or not all(map(all_plain, modules.values()))
        or any(part.training for part in parts)
        or any(type(tensor) not in _PLAIN or tensor.is_meta for tensor in tensors)
    ):
        return given
    weights = fingerprint(modules.items())
    known, cache = _caches.get(model, ("", None))
    if cache is None or known != weights:
        cache = ImageCache(_MAX_BYTES)
        _caches[model] = weights, cache
    with torch.inference_mode():
        return ImageReader(model, cache).replace_pixels(given)
