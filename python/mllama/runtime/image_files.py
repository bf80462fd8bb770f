"""Tensors by key in a folder of safetensors files that several processes may use at once."""

import contextlib
import logging
import os
import re
import stat
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load

from mllama.checkpoints.files import save_tensors, write_file
from mllama.runtime.fingerprint import hash_tensors

_log = logging.getLogger(__name__)
_NAME = re.compile(r"[0-9a-f]{64}\.safetensors")
_ASIDE = ".*.safetensors-*"  # files that are being written; a killed process leaves them
_HOUR = 3600
_SPARE = 32  # part of the limit that is freed beyond it
_WRITERS = 4  # processes that may write at once without exceeding the limit
_HEADER = 256  # bytes of a tensor in a file, beside its values, at most
_DIGEST = "digest"  # name of a tensor: the hash of the key and the others


class ImageFiles:
    """Entries as files, each named after its key. The least recently used are removed.

    A file that is broken, cut off or another's counts as absent. So does a folder that cannot be
    read or written, apart from a warning in the log.

    Args:
        folder: created if needed.
        max_bytes: limit of all files together. Files of other names are left alone.

    Raises:
        TypeError: folder is not a path.
        OSError: it cannot be created.
    """

    def __init__(self, folder: str | os.PathLike, max_bytes: int):
        if not isinstance(folder, (str, os.PathLike)) or not os.fspath(folder):
            raise TypeError(f"folder must be a path, got {folder!r}")
        self._folder, self._max_bytes = Path(os.path.abspath(folder)), max_bytes
        self._folder.mkdir(parents=True, exist_ok=True)
        self._room = 0  # bytes to write before the files are counted again

    def read(self, key: bytes, device: torch.device) -> tuple[torch.Tensor, ...] | None:
        """The tensors of a key, or None."""
        path = self._path(key)
        try:
            state = path.stat()
            if state.st_size > self._max_bytes or not stat.S_ISREG(state.st_mode):  # a pipe waits
                return None
            found = load(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, SafetensorError, ValueError, KeyError, RuntimeError) as error:
            _log.warning("%s is not used: %s", path, error)
            return None
        digest = found.pop(_DIGEST, torch.empty(0))
        try:
            named = {str(index): found[str(index)] for index in range(len(found))}
            whole = bytes(digest.tolist()) == hash_tensors(key, named)
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole:
            _log.warning("%s is not used: its content is another", path)
            return None
        self._touch(path)
        return tuple(tensor.to(device) for tensor in named.values())

    def write(self, key: bytes, tensors: Iterable[torch.Tensor]) -> None:
        """Store the tensors of a key, then remove what exceeds the limit."""
        tensors = [tensor.cpu().contiguous() for tensor in tensors]
        if sum(tensor.nbytes + _HEADER for tensor in tensors) > self._max_bytes:
            return
        named = {str(index): tensor for index, tensor in enumerate(tensors)}
        digest = list(hash_tensors(key, named))
        named[_DIGEST] = torch.tensor(digest, dtype=torch.uint8, device="cpu")
        try:
            write_file(self._path(key), lambda aside: save_tensors(aside, named))
            self._room -= self._path(key).stat().st_size
            if self._room < 0:
                self._trim()
        except OSError as error:
            _log.warning("%s: an image's features are not stored: %s", self._folder, error)

    def _path(self, key: bytes) -> Path:
        return self._folder / f"{key.hex()}.safetensors"

    def _touch(self, path: Path) -> None:
        with contextlib.suppress(OSError):  # a folder that can only be read
            os.utime(path)

    def _trim(self) -> None:
        """Remove the files that were not used for longest if they exceed the limit."""
        found = []
        for path in self._folder.iterdir():
            if _NAME.fullmatch(path.name):
                with contextlib.suppress(FileNotFoundError):  # another process removed it
                    if stat.S_ISREG((state := path.stat()).st_mode):
                        found.append((state.st_mtime_ns, state.st_size, path))
        left = sum(size for _, size, _ in found)
        # Somewhat below the limit, so that the next writes need not count all files again.
        most = self._max_bytes - (self._max_bytes // _SPARE if left > self._max_bytes else 0)
        for _, size, path in sorted(found):
            if left <= most:
                break
            with contextlib.suppress(PermissionError):  # another user's: the next ones go
                path.unlink(missing_ok=True)
                left -= size
        self._room = (self._max_bytes - left) // _WRITERS
        for path in self._folder.glob(_ASIDE):
            with contextlib.suppress(FileNotFoundError):
                if path.stat().st_mtime < time.time() - _HOUR:
                    path.unlink()
