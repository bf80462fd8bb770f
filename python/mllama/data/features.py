"""Features of a frozen image encoder, kept in files from epoch to epoch and from run to run."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from mllama.nn.plain import all_plain
from mllama.nn.wrappers import is_sharded, unwrapped
from mllama.runtime.image_cache import ImageCache
from mllama.runtime.images import ImageReader

MAX_BYTES = 2**35  # of a folder: 32 GiB


class FeatureCache:
    """Replaces a batch's pixels by image features, from files where they are there.

    A file is named after the image's pixels, the settings and the weights of encoder and projector;
    whatever changes makes other files. Weights are read once, and again after changes that torch
    counts: all but writes through `.data` in place, after which a new cache is needed. A file has
    the hash of its content: a broken one is computed again. Files are written to a temporary name
    and renamed, and processes may share a folder.

    Args:
        model: the model to train, as `mllama.load` returns it; may be wrapped.
        folder: created if needed. Whoever can write there decides what the model sees.
        max_bytes: limit of all files in the folder; the least recently used ones are removed. Where
            it is less than an epoch's images need, nothing is found again.

    Raises:
        TypeError: folder is not a path, or max_bytes not an int.
        ValueError: the model has no images or is sharded, its encoder or projector is trained, has
            hooks or dropout, or max_bytes is not positive.
        OSError: folder cannot be created.
    """

    def __init__(self, model: Any, folder: str | os.PathLike, max_bytes: int = MAX_BYTES):
        self._model: Any = unwrapped(model)
        if self._model.spec.encoder is None:
            raise ValueError("cache_features needs a model with images")
        self._check_frozen()
        cache = ImageCache(0, folder, max_bytes, is_frozen=True)
        self._reader = ImageReader(self._model, cache)

    def replace(self, batch: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """A batch with image_features, in place of its pixel_values if it has any.

        Raises:
            ValueError: encoder or projector are trained by now, or have hooks.
        """
        if "pixel_values" not in batch:
            return dict(batch)
        self._check_frozen()
        # Not in inference mode: the decoder's backward pass reads the features.
        with torch.no_grad(), self._evaluated():
            return self._reader.replace_pixels(batch)

    @contextmanager
    def _evaluated(self) -> Iterator[None]:
        """Context in eval mode, which names of files depend on: both modes have the same ones."""
        parts = [part for _, module in self._model.encoder_modules() for part in module.modules()]
        training = [part for part in parts if part.training]
        for part in training:
            part.training = False
        try:
            yield
        finally:
            for part in training:
                part.training = True

    def _check_frozen(self) -> None:
        for name, module in self._model.encoder_modules():
            if is_sharded(module):
                raise ValueError(f"cache_features does not read sharded weights, as {name} has")
            if not all_plain(module):
                raise ValueError(f"cache_features needs {name} without hooks")
            for inner, parameter in module.named_parameters(prefix=name):
                if parameter.requires_grad:
                    raise ValueError(
                        f"cache_features needs a frozen encoder, and {inner} is trained"
                    )
            for inner, part in module.named_modules(prefix=name):
                if part.training and getattr(part, "dropout", 0.0):
                    raise ValueError(
                        f"cache_features needs an encoder without dropout, as {inner} has"
                    )
