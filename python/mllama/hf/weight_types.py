"""Bytes of a checkpoint's weights, by part of the model and by type."""

import torch
from transformers import PreTrainedModel

from mllama.checkpoints.loading import Report
from mllama.checkpoints.opened import Opened
from mllama.checkpoints.sources import Header
from mllama.model.memory import part_of
from mllama.nn.packed import PACKED


def count_bytes(
    opened: Opened, model: PreTrainedModel, report: Report
) -> dict[str, dict[str, int]]:
    """Bytes in the files, without their headers.

    Args:
        opened: the files.
        model, report: as `mllama.hf.models.survey_opened` returns them.

    Returns:
        {part: {type: bytes}}, with the parts of `mllama.model.memory.PARTS`. Types are dtypes as
        "bf16", packed formats as "int4", or GGUF's blocks as "q4_k".
    """
    found: dict[str, dict[str, int]] = {}
    headers = opened.source.headers()
    for move in report.moves:
        for name in move.theirs if move.ours else ():
            owner, _, last = move.ours[0].rpartition(".")
            kind, size = _stored(headers[name])
            if opened.packing is not None and kind == "u8":
                if last != PACKED:
                    continue
                kind = model.get_submodule(owner).packing  # type: ignore[assignment]
            types = found.setdefault(part_of(model, move.ours[0]), {})
            types[kind] = types.get(kind, 0) + size
    return found


def _stored(header: Header) -> tuple[str, int]:
    """A tensor's type and size in its file."""
    count = torch.Size(header.shape).numel()
    if header.blocks is None:
        return _NAMES.get(header.dtype, str(header.dtype)), count * header.dtype.itemsize
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[header.blocks]]
    return header.blocks.lower(), count // block * size


_NAMES = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.uint8: "u8",
}
