"""`mllama.quantize`: packs a model's weights into a folder of its own, and reports what that costs
in accuracy.
"""

import os
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mllama.checkpoints import open_checkpoint
from mllama.checkpoints.files import check_free, write_folder, write_json
from mllama.checkpoints.hub import find_folder
from mllama.checkpoints.opened import Opened
from mllama.device import dtype_name
from mllama.hf.checkpoints import load_model, load_opened
from mllama.hf.models import model_class, survey_opened
from mllama.hf.processors.auto import processor_to_write
from mllama.hf.weight_types import count_bytes
from mllama.lora.loading import load_lora
from mllama.lora.state import merge_and_unload
from mllama.processing.folders import PROCESSOR_FILES
from mllama.quant.packer import FILE, RECIPES, optimize
from mllama.quant.report import compare, cross_entropy, perplexity

REPORT = "quantization_report.json"
WINDOW = 512  # tokens that a row of a text has at most
CALIBRATED = 32  # rows of a calibration text
_DEFAULT_TEXT = 6000  # characters


def quantize(
    source: str | os.PathLike,
    target: str | os.PathLike,
    weights: str = "int4",
    *,
    dtype: str | torch.dtype = "auto",
    calibration: str | os.PathLike | None = None,
    text: str | os.PathLike | None = None,
    report: bool = True,
    force: bool = False,
    max_shard_size: int | str = "5GB",
    adapter: str | os.PathLike | None = None,
) -> dict[str, Any]:
    """Write a model with packed weights, and its processor, to a folder that `mllama.load` and
    `from_pretrained` open by mapping it into memory.

    The model is packed while it is read: memory has the packed weights and one dense tensor. The
    report compares both models on a text; the source's weights are then mapped from their files, or
    in memory, if they fit.

    Args:
        source: anything `mllama.load` takes: a folder, a GGUF file, a model id on the hub.
        target: a folder; written atomically.
        weights: "int4", "int8", "bf16", "f16", "f32", or "file", as `mllama.load` takes them.
        dtype: of norms and biases, and of the activations later: "auto" is the files' own.
        calibration: a UTF-8 text file for which the codes of "int4" are chosen, as
            `mllama.optimize` does; its first 16,384 tokens are used. The whole model is in memory
            then, or mapped from its files.
        text: a UTF-8 text file for the report. Default: English documentation of Python.
        report: False skips it.
        force: write into a folder that is not empty; files that are not part of a model stay.
        max_shard_size: maximum size of a weight file in bytes, or a text such as "5GB".
        adapter: a LoRA adapter, as `mllama.load_lora` takes it, that is merged into the weights
            before they are packed. The report compares with the merged model. The whole model is in
            memory then.

    Returns:
        The report, which is also in the folder as quantization_report.json: "weights",
        "bytes" by part and weight type before and after, and what `mllama.quant.report.compare`
        returns. {} without one.

    Raises:
        FileNotFoundError: there is no such model or text.
        FileExistsError: target exists and is not empty.
        ValueError: weights or dtype is unknown; the source's weights are packed already; the text
            is too short or has no use; an adapter cannot be merged, or weights is "file" with one;
            or as `mllama.load` and `mllama.load_lora`.
    """
    if weights not in (known := [*RECIPES, FILE]):
        raise ValueError(f"weights must be one of {', '.join(known)}, got {weights!r}")
    if text is not None and not report:
        raise ValueError("text is for the report, and report is False")
    if adapter is not None and weights == FILE:
        raise ValueError("weights must be a format with adapter, which is merged: got 'file'")
    path, target = find_folder(source), Path(target)
    if path.resolve() == target.resolve():
        raise ValueError(f"OUT must be another folder than IN, got {target} for both")
    check_free(target, force)
    with (opened := _open(path)).source:
        processor = processor_to_write(path)
        kind: Any = model_class(opened.spec)
        longest = opened.spec.text.max_position_embeddings if opened.spec.text else 0
        ids = _token_ids(processor, text, longest) if report else None
        if calibration is None and adapter is None:
            model, _ = load_opened(kind, opened, dtype, weights=weights)
        else:
            known_ids: Any = None
            if calibration is not None:
                known_ids = _token_ids(processor, calibration, longest)
            model = _dense(opened, dtype, adapter)
            optimize(model, weights, None if known_ids is None else known_ids[:CALIBRATED])
    packed: list[PreTrainedModel] = [model]
    del model
    found: dict[str, Any] = {}

    def write(aside: Path) -> None:
        packed.pop().save_pretrained(aside, max_shard_size=max_shard_size)  # and read from there
        if processor is not None:
            processor.save_pretrained(aside)
        if report:
            found.update({"weights": weights, "calibrated": calibration is not None})
            found.update(_report(path, aside, ids, adapter))
            write_json(aside / REPORT, found)

    write_folder(target, write, (REPORT, *(() if processor is None else PROCESSOR_FILES)))
    return found


def _dense(opened: Opened, dtype: Any, adapter: str | os.PathLike | None) -> Any:
    """The model before packing: mapped, or in memory with the adapter merged."""
    model, _ = load_opened(model_class(opened.spec), opened, dtype, mapped=adapter is None)
    if adapter is None:
        return model
    load_lora(model, adapter)
    return merge_and_unload(model)


def _open(path: Path) -> Opened:
    opened = open_checkpoint(path)
    if opened.packing is not None:
        raise ValueError(
            f"{path} has weights that are packed as {opened.packing}: give the model that they "
            "were packed from"
        )
    return opened


def _token_ids(processor: Any, text: str | os.PathLike | None, longest: int) -> torch.Tensor | None:
    """int64 [rows, T] of a text file, T at most `longest`; None without a tokenizer.

    Raises:
        ValueError: the text is no UTF-8, or has less than 2 tokens; or it is given and there is no
            tokenizer.
    """
    if text is None:
        content = _default_text()
    else:
        try:
            content = Path(text).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{text} is no UTF-8 text: {error}") from error
    tokenizer = getattr(processor, "tokenizer", processor)
    if not callable(getattr(tokenizer, "encode", None)):
        if text is None:
            return None
        raise ValueError(f"{text} has no use: the model has no tokenizer")
    ids = torch.tensor(tokenizer.encode(content, add_special_tokens=False), dtype=torch.int64)
    if len(ids) < 2:
        raise ValueError(f"{text} is {len(ids)} tokens long, too short")
    width = min(WINDOW, longest, len(ids))
    return ids[: len(ids) // width * width].view(-1, width)


def _default_text() -> str:
    """Of the language reference that comes with Python."""
    from pydoc_data.topics import topics

    return "\n".join(topics[name] for name in sorted(topics))[:_DEFAULT_TEXT]


def _report(
    path: Path, target: Path, ids: torch.Tensor | None, adapter: str | os.PathLike | None
) -> dict[str, Any]:
    with (opened := open_checkpoint(path)).source:
        sizes = {"before": count_bytes(opened, *survey_opened(opened))}
        with (written := open_checkpoint(target)).source:
            sizes["after"] = count_bytes(written, *survey_opened(written))
        found: dict[str, Any] = {"bytes": sizes}
        if ids is None:
            return found | {"skipped": "the model has no tokenizer"}
        dtype = _comparable_dtype(opened, opened.source.mapped and adapter is None)
        packed = load_model(model_class(opened.spec), target, dtype=dtype or "auto")
        found["tokens"] = ids.numel()
        if dtype is None:
            losses = cross_entropy(packed, ids)
            return found | {
                "perplexity": {"packed": perplexity(losses)},
                "skipped": "the source does not fit into memory, so nothing is compared with it",
            }
        dense = _dense(opened, dtype, adapter)
        return found | {"dtype": dtype_name(dtype)} | compare(dense, packed, ids)


def _comparable_dtype(opened: Opened, mapped: bool) -> torch.dtype | None:
    """The dtype in which the source fits beside a packed model: float32 if there is room, else the
    files' own; None if there is room for neither. Mapped ones need none.
    """
    headers = opened.source.headers().values()
    room = _available_bytes()
    elements = sum(torch.Size(header.shape).numel() for header in headers)
    if room is None or 4 * elements < room / 2:
        return torch.float32
    dtypes = [header.dtype for header in headers]
    own = max(set(dtypes), key=dtypes.count)
    if mapped or own.itemsize * elements < room:
        return own
    return None


def _available_bytes() -> int | None:
    """Memory that is free or can be freed; None where the system does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    found = [line.split() for line in lines if line.startswith("MemAvailable:")]
    return 1024 * int(found[0][1]) if found else None
