"""Reads the header of a GGUF file with the gguf library. Every number in it is bounded by the
file's size before use.
"""

import functools
import gc
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np

try:
    import gguf  # re-exported to the other modules
except ImportError as error:  # an optional dependency
    raise ImportError(
        "reading and writing GGUF files needs the package gguf: pip install 'mllama[convert]'"
    ) from error

if not all(
    hasattr(gguf.GGUFReader, name)
    for name in ("_get", "_get_field_parts", "_get_tensor_info_field")
):
    raise ImportError(
        "this version of the package gguf has another reader, which is not bounded here: pip "
        "install gguf==0.19.0"
    )

_READS_MAX = 2**21  # limit of values in a header; Llama 4's vocabulary and merges take 1.3 million
_DIMS_MAX = 4  # ggml's GGML_MAX_DIMS
_ARRAY = int(gguf.GGUFValueType.ARRAY)  # an int compares much faster


class _Reader(gguf.GGUFReader):
    """gguf's reader with bounds. The original trusts the file: a count beyond its end loops without
    limit, and nested arrays recurse.

    All other reads than `_get_texts` go through `_get`, so bounds there apply everywhere.
    """

    _reads = 0

    def _get(self, offset, dtype, count=1, override_order=None):
        start, end = int(offset), int(offset) + int(count) * np.dtype(dtype).itemsize
        if self.byte_order != "I":
            raise ValueError("it is of the other byte order")
        if not 0 <= start <= end <= len(self._bytes):
            raise ValueError("it ends before the end of its header")
        self._reads += 1
        if self._reads > _READS_MAX:
            raise ValueError("its header has too many values")
        return self._bytes[start:end].view(dtype)

    @functools.cached_property
    def _bytes(self) -> np.ndarray:
        return np.asarray(
            self.data
        )  # a view: slices of a plain array are smaller and faster than a memmap's

    def _get_field_parts(self, orig_offs, raw_type):
        """As gguf's, but one view for an array of numbers and one per text for an array of texts;
        gguf makes several per element.
        """
        if raw_type != _ARRAY:
            return super()._get_field_parts(orig_offs, raw_type)
        head = [self._get(orig_offs, np.uint32), self._get(orig_offs + 4, np.uint64)]
        kind, length, end = gguf.GGUFValueType(head[0][0]), int(head[1][0]), orig_offs + 12
        values = []
        if (scalar := self.gguf_scalar_to_np.get(kind)) is not None:
            values.append(self._get(end, scalar, length))
            end += values[0].nbytes
        elif kind == gguf.GGUFValueType.STRING:
            values, end = self._get_texts(int(end), length)
        else:
            raise ValueError("it has an array of arrays")
        places = list(range(len(head), len(head) + len(values)))
        return end - orig_offs, head + values, places, [gguf.GGUFValueType.ARRAY, kind]

    def _get_texts(self, start: int, count: int) -> tuple[list[np.ndarray], int]:
        """Texts one after the other, each after its length, and where they end. A vocabulary has
        100,000 of them, so that `_get` for each would take a second.
        """
        self._reads += count
        if self._reads > _READS_MAX:
            raise ValueError("its header has too many values")
        data, buffer, length_of = self._bytes, memoryview(self._bytes), struct.Struct("<Q")
        texts, size = [], len(data)
        for _ in range(count):
            if start + 8 > size:
                raise ValueError("it ends before the end of its header")
            end = start + 8 + length_of.unpack_from(buffer, start)[0]
            if end > size:
                raise ValueError("it ends before the end of its header")
            texts.append(data[start + 8 : end])
            start = end
        return texts, start

    def _get_tensor_info_field(self, orig_offs):
        field = super()._get_tensor_info_field(orig_offs)
        if (dims := field.parts[2][0]) > _DIMS_MAX:
            raise ValueError(f"it has a tensor of {dims} dimensions; at most {_DIMS_MAX} are valid")
        return field


class GgufHeader:
    """Metadata and tensor entries of a GGUF file. Tensors are not read.

    Attributes:
        path: the file.
        tensors: entries by name, in file order. They neither overlap nor leave the file.
    """

    def __init__(self, path: str | os.PathLike):
        """
        Raises:
            FileNotFoundError: the file does not exist.
            ValueError: it is not a valid GGUF file.
        """
        self.path = Path(path)
        if not self.path.is_file():
            raise FileNotFoundError(f"no GGUF file {str(path)!r}")
        collecting = gc.isenabled()
        # Every text is an object: collecting garbage among them takes as long as reading.
        gc.disable()
        try:
            with np.errstate(over="raise"):  # offsets are added as uint64
                reader = _Reader(self.path)
            self._fields = reader.fields
            self.tensors = _laid_out(reader)
        except (
            ValueError,
            KeyError,
            IndexError,
            TypeError,
            OverflowError,
            FloatingPointError,
        ) as error:
            raise ValueError(f"{path} is not a valid GGUF file: {str(error)[:200]}") from error
        finally:
            if collecting:
                gc.enable()

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """A metadata value.

        Args:
            key: the full name.
            kind: int, float, bool, str or list.
            default: value for a missing key. None: the key is required.

        Raises:
            ValueError: the key is missing, or its value has another type.
        """
        if key not in self._fields:
            if default is None:
                raise ValueError(f"{self.path} has no {key}")
            return default
        field = self._fields[key]
        value = field.contents()
        if field.types == [gguf.GGUFValueType.FLOAT32]:
            value = float(str(np.float32(value)))  # 1e-05 instead of 9.999999747378752e-06
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise ValueError(
                f"{self.path}: {key} must be of the kind {kind.__name__}, got {str(value)[:200]!r}"
            )
        return value

    def __contains__(self, key: str) -> bool:
        return key in self._fields


def _laid_out(reader: _Reader) -> dict[str, gguf.ReaderTensor]:
    tensors = sorted(reader.tensors, key=lambda tensor: tensor.data_offset)
    free = int(reader.data_offset)
    for tensor in tensors:
        if not tensor.n_elements:
            raise ValueError(f"{tensor.name} has no elements")
        if tensor.data_offset < free:
            raise ValueError(f"{tensor.name} overlaps the data before it")
        free = tensor.data_offset + tensor.n_bytes
    return {tensor.name: tensor for tensor in tensors}
