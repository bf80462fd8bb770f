"""What a model computed of images, kept by their content: in memory, and in files."""

import hashlib
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from mllama.nn.adapted import adapter_state
from mllama.nn.checks import check_count
from mllama.nn.plain import all_plain
from mllama.runtime.fingerprint import fingerprint, structure, traces
from mllama.runtime.image_files import ImageFiles

MAX_BYTES = 2**29  # of memory
MAX_FOLDER_BYTES = 2**33
_FORMAT = 1  # of files: raise it when a model computes other values of the same weights

Entry = tuple[torch.Tensor, ...]  # an image's features, or its keys and values in all layers


class ImageCache:
    """Entries by key, of one model; the least recently used are dropped. Sessions of the model may
    share a cache, in several threads too.

    In memory the model's weights are not part of the key: call `clear`, or a session's `reset`,
    after changing them. Adapters that are attached, replaced, switched or merged are noticed, and
    so are hooks and modules in place of others, such as PEFT's. Files
    are named after the weights as well, so that a folder serves several models; where hooks or
    other forwards compute something else of the same weights, files are neither read nor written.

    Args:
        max_bytes: limit in the memory of the model's device; 0 keeps nothing there.
        folder: where entries are kept as files too; created if needed. Whoever can write there
            decides what the model sees. Default: nowhere.
        max_folder_bytes: limit of all files in the folder.
        is_frozen: the model's weights are read once, and again after changes that torch counts.
            Writes through `.data` in place are not counted. Default: they are read after each
            `attach`.

    Raises:
        TypeError: a limit is not an int, or folder is not a path.
        ValueError: max_bytes is negative, or max_folder_bytes is not positive.
        OSError: folder cannot be created.
    """

    def __init__(
        self,
        max_bytes: int = MAX_BYTES,
        folder: str | os.PathLike | None = None,
        max_folder_bytes: int = MAX_FOLDER_BYTES,
        is_frozen: bool = False,
    ):
        check_count("max_bytes", max_bytes, 0)
        check_count("max_folder_bytes", max_folder_bytes)
        self.max_bytes = max_bytes
        self._files = None if folder is None else ImageFiles(folder, max_folder_bytes)
        self._entries: OrderedDict[bytes, Entry] = OrderedDict()
        self._bytes = 0
        self._model: Callable[[], Any] = lambda: None  # a weak reference
        self._of_features = False  # which of its modules entries depend on
        self._weights = ""  # their fingerprint, once it is needed after `attach`
        self._is_frozen = is_frozen
        self._traces: tuple | None = None  # what the fingerprint of frozen ones stands for
        self._state: tuple = ()  # adapters, modules and hooks that the entries were computed with
        self._lock = threading.Lock()

    def __len__(self) -> int:
        """Number of entries in memory."""
        return len(self._entries)

    def __contains__(self, key: bytes) -> bool:
        """Whether an entry is in memory."""
        return key in self._entries

    @property
    def nbytes(self) -> int:
        """Bytes of the entries in memory."""
        return self._bytes

    def attach(self, model: Any, of_features: bool = False) -> None:
        """Say whose images are looked up next. What other adapters, modules or hooks computed is
        dropped, and the weights are looked at again before a file is used.

        Args:
            model: a `VisionLanguageModel`.
            of_features: entries are features, which depend on `encoder_modules` alone. Default:
                they may depend on all `image_modules`.

        Raises:
            ValueError: the cache is another model's.
        """
        with self._lock:
            if self._model() is None:
                self._model = weakref.ref(model)
            elif self._model() is not model:
                raise ValueError("image_cache must be of this model alone, it is another's already")
            self._of_features = of_features
            modules = [module for _, module in self._modules(model)]
            state = adapter_state(), structure(modules)
            found = traces(modules) if self._is_frozen else None
            if self._state != state:
                self._clear()
            if found is None or (self._state, self._traces) != (state, found):
                self._weights = ""
            self._state, self._traces = state, found

    def clear(self) -> None:
        """Forget the entries in memory."""
        with self._lock:
            self._clear()

    def find(self, key: bytes, compute: Callable[[], Entry]) -> Entry:
        """An entry from memory, from a file, or computed and kept.

        Args:
            key: hash of the image and of all that the entry depends on, except for weights.
            compute: makes the entry.
        """
        with self._lock:
            if key in self._entries:
                self._entries.move_to_end(key)
                return self._entries[key]
        entry = compute() if self._files is None else self._from_file(key, self._files, compute)
        with self._lock:
            self._keep(key, entry)
        return entry

    def _from_file(self, key: bytes, files: ImageFiles, compute: Callable[[], Entry]) -> Entry:
        model = self._model()
        modules = list(self._modules(model))
        if not all(all_plain(module) for _, module in modules):
            return compute()
        # Another thread's `attach` may forget it at any time.
        weights = self._weights = self._weights or fingerprint(modules)
        context = f"{_FORMAT} {torch.__version__} {weights}".encode()
        name = hashlib.blake2b(context + key, digest_size=32).digest()
        entry = files.read(name, next(model.parameters()).device)
        if entry is None:
            entry = compute()
            files.write(name, entry)
        return entry

    def _modules(self, model: Any) -> Iterable[tuple[str, nn.Module]]:
        return model.encoder_modules() if self._of_features else model.image_modules()

    def _keep(self, key: bytes, entry: Entry) -> None:
        size = _nbytes(entry)
        if key in self._entries or size > self.max_bytes:
            return
        self._entries[key] = entry
        self._bytes += size
        while self._bytes > self.max_bytes:
            self._bytes -= _nbytes(self._entries.popitem(last=False)[1])

    def _clear(self) -> None:
        self._entries.clear()
        self._bytes = 0


def _nbytes(entry: Entry) -> int:
    return sum(tensor.nbytes for tensor in entry)
