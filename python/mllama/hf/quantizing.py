"""`mllama.quantize`: packs a model's weights into a folder of its own, and reports what that costs
in accuracy.
"""

import os
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from mllama.checkpoints import open_checkpoint
from mllama.checkpoints.files import write_folder, write_json
from mllama.checkpoints.hub import find_folder
from mllama.checkpoints.opened import Opened
from mllama.device import dtype_name
from mllama.hf.checkpoints import load_model, load_opened
from mllama.hf.models import model_class, survey_opened
from mllama.hf.processors.auto import load_processor
from mllama.hf.weight_types import count_bytes
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

    Returns:
        The report, which is also in the folder as quantization_report.json: "weights",
        "bytes" by part and weight type before and after, and what `mllama.quant.report.compare`
        returns. {} without one.

    Raises:
        FileNotFoundError: there is no such model or text.
        FileExistsError: target exists and is not empty.
        ValueError: weights or dtype is unknown; the source's weights are packed already; the text
            is too short or has no use; or as `mllama.load`.
    """
    if weights not in (known := [*RECIPES, FILE]):
        raise ValueError(f"weights must be one of {', '.join(known)}, got {weights!r}")
    if text is not None and not report:
        raise ValueError("text is for the report, and report is False")
    path, target = find_folder(source), Path(target)
    if path.resolve() == target.resolve():
        raise ValueError(f"OUT must be another folder than IN, got {target} for both")
    check_free(target, force)
    with (opened := _open(path)).source:
        processor = _processor(path)
        kind: Any = model_class(opened.spec)
        longest = opened.spec.text.max_position_embeddings if opened.spec.text else 0
        ids = _token_ids(processor, text, longest) if report else None
        if calibration is None:
            model, _ = load_opened(kind, opened, dtype, weights=weights)
        else:
            known_ids: Any = _token_ids(processor, calibration, longest)
            model, _ = load_opened(kind, opened, dtype, mapped=True)
            optimize(model, weights, known_ids[:CALIBRATED])
    packed: list[PreTrainedModel] = [model]
    del model
    found: dict[str, Any] = {}

    def write(aside: Path) -> None:
        packed.pop().save_pretrained(aside, max_shard_size=max_shard_size)  # and read from there
        if processor is not None:
            processor.save_pretrained(aside)
        if report:
            found.update({"weights": weights, "calibrated": calibration is not None})
            found.update(_report(path, aside, ids))
            write_json(aside / REPORT, found)

    write_folder(target, write, (REPORT, *(() if processor is None else PROCESSOR_FILES)))
    return found


def check_free(target: Path, force: bool) -> None:
    """Check, before reading anything, that nothing is overwritten unless `force` says so.

    Raises:
        ValueError: target is a file.
        FileExistsError: target is not empty.
    """
    if target.exists() and not target.is_dir():
        raise ValueError(f"OUT must be a folder, and {target} is none")
    if not force and target.exists() and any(target.iterdir()):
        raise FileExistsError(f"{target} exists and is not empty; --force writes over it")


def _open(path: Path) -> Opened:
    opened = open_checkpoint(path)
    if opened.packing is not None:
        raise ValueError(
            f"{path} has weights that are packed as {opened.packing}: give the model that they "
            "were packed from"
        )
    return opened


def _processor(path: Path) -> Any:
    """The model's processor; None, with a message, if the source has none."""
    try:
        return load_processor(path)
    except FileNotFoundError as error:
        print(f"mllama: no tokenizer or processor is written: {error}", file=sys.stderr)
        return None


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


def _report(path: Path, target: Path, ids: torch.Tensor | None) -> dict[str, Any]:
    with (opened := open_checkpoint(path)).source:
        sizes = {"before": count_bytes(opened, *survey_opened(opened))}
        with (written := open_checkpoint(target)).source:
            sizes["after"] = count_bytes(written, *survey_opened(written))
        found: dict[str, Any] = {"bytes": sizes}
        if ids is None:
            return found | {"skipped": "the model has no tokenizer"}
        dtype = _comparable_dtype(opened)
        kind = model_class(opened.spec)
        packed = load_model(kind, target, dtype=dtype or "auto")
        found["tokens"] = ids.numel()
        if dtype is None:
            losses = cross_entropy(packed, ids)
            return found | {
                "perplexity": {"packed": perplexity(losses)},
                "skipped": "the source does not fit into memory, so nothing is compared with it",
            }
        dense, _ = load_opened(kind, opened, dtype, mapped=True)
        return found | {"dtype": dtype_name(dtype)} | compare(dense, packed, ids)


def _comparable_dtype(opened: Opened) -> torch.dtype | None:
    """The dtype in which the source fits beside a packed model: float32 if there is room, else the
    files' own; None if there is room for neither. Mapped files need none.
    """
    headers = opened.source.headers().values()
    room = _available_bytes()
    elements = sum(torch.Size(header.shape).numel() for header in headers)
    if room is None or 4 * elements < room / 2:
        return torch.float32
    dtypes = [header.dtype for header in headers]
    own = max(set(dtypes), key=dtypes.count)
    if opened.source.mapped or own.itemsize * elements < room:
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
