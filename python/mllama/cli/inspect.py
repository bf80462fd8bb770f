"""`mllama inspect FOLDER`: family, sizes, memory and loading problems of a model. Reads headers, no
tensors.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from mllama.api import find_model
from mllama.checkpoints import open_checkpoint
from mllama.checkpoints.loading import Report
from mllama.checkpoints.opening import config_alone
from mllama.checkpoints.sources import pickled_weights, refused_pickle
from mllama.config.spec import ModelSpec
from mllama.device import dtype_name, dtype_named
from mllama.families import compose
from mllama.hf.config_objects import config_object
from mllama.hf.models import model_class, survey_opened
from mllama.hf.names import PreTrainedModel
from mllama.hf.weight_types import count_bytes
from mllama.lora.adapters import plain_layers
from mllama.lora.files import describe_adapter, misfit
from mllama.model.memory import Work, count_parameters, image_tokens, memory_needed, part_of
from mllama.weights.family import Config

_CONTEXT = 4096  # default for models that take more
_MOST_LAYERS = 1000  # the largest released models have some 130
_FLOAT32 = 4  # bytes; the dtype of adapters, whatever the model's
_SHOWN = 5  # names printed per kind of problem; --json prints all


def run(arguments: argparse.Namespace) -> int:
    """Print the report; exit code 1 if the weights would not load. Without weights the sizes come
    from config.json.
    """
    found = collect(
        arguments.folder,
        arguments.context,
        arguments.batch,
        arguments.tiles,
        arguments.dtype,
        arguments.adapter,
    )
    print(json.dumps(found) if arguments.json else _page(found))
    adapter = found["adapter"]
    return 1 if found["loads"] is False or (adapter and not adapter["fits"]) else 0


def collect(
    folder: str | Path | None,
    context: int | None,
    batch: int,
    tiles: int | None,
    dtype: str,
    adapter: str | None = None,
) -> dict[str, Any]:
    """Everything that `run` prints.

    Args:
        folder: a folder or file as `open_checkpoint` takes it, or a folder with config.json alone.
            Default: the embedded model.
        context: tokens per row. Default: 4096, or the model's maximum if that is less.
        batch: number of rows.
        tiles: tiles of a row's images. Default: one image's.
        dtype: dtype to load the model in; "auto" is the files' own.
        adapter: an adapter for it, as `mllama.load_lora` takes it.

    Raises:
        FileNotFoundError, ValueError: as `open_checkpoint` and `describe_adapter`; context or
            tiles given for a model without a decoder or without images.
    """
    path, pickles = find_model(folder), []
    if (config := config_alone(path)) is not None:
        model, report, headers = _lay_out(config), Report(dtype=_dtype_of(config)), {}
        pickles = pickled_weights(path)
        stored: dict[str, dict[str, int]] = {}
    else:
        with (opened := open_checkpoint(path)).source:
            config = opened.config
            model, report = survey_opened(opened)
            headers = opened.source.headers()
            stored = count_bytes(opened, model, report)
    spec, parameters = model.spec, count_parameters(model)
    elements: dict[str, int] = {}
    for header in headers.values():
        elements[dtype_name(header.dtype)] = (
            elements.get(dtype_name(header.dtype), 0) + torch.Size(header.shape).numel()
        )
    work = _work(model, report, context, batch, tiles, dtype)
    memory = memory_needed(model, work)
    adapted = None if adapter is None else _adapted(model, adapter)
    if adapted is not None:
        memory["adapter"] = _FLOAT32 * sum(part["parameters"] for part in adapted["parts"].values())
    return {
        "folder": str(path),
        "family": config["model_type"],
        "made of": _made_of(spec),
        "sizes": _sizes(spec, work.tiles),
        "read as": elements,
        "stored": stored,
        "parameters": parameters | {"total": sum(parameters.values())},
        "adapter": adapted,
        "work": {
            "context": work.context,
            "batch": work.batch,
            "tiles": work.tiles,
            "dtype": dtype_name(work.dtype),
        },
        "memory": memory | {"total": sum(memory.values())},
        "loads": not report.problems() if headers else False if pickles else None,
        "pickles": pickles,
        "missing": report.missing,
        "unexpected": report.unexpected,
        "of another shape or kind": report.unfit,
        "given twice": report.twice,
    }


def _lay_out(config: Config) -> PreTrainedModel:
    """Build the model of a config on the meta device; the number of layers is bounded."""
    spec = compose(config)
    for part in filter(None, (spec.text, spec.vision)):
        if (layers := part.num_hidden_layers) > _MOST_LAYERS:
            raise ValueError(
                f"num_hidden_layers is {layers}: without weights at most {_MOST_LAYERS} are laid "
                "out"
            )
    with torch.device("meta"):
        return model_class(spec)(config_object(config))


def _adapted(model: PreTrainedModel, path: str) -> dict[str, Any]:
    """What an adapter file has and, if it fits the model, which gets it, where that goes: layers
    and parameters by the model's parts.
    """
    found = {"path": path} | describe_adapter(path)
    problem = misfit(model, path)
    parts: dict[str, dict[str, int]] = {}
    for name, layer in plain_layers(model).items():
        part = parts.setdefault(part_of(model, name), {"layers": 0, "parameters": 0})
        part["layers"] += 1
        part["parameters"] += sum(one.numel() for one in layer.adapter())
    return found | {"parts": parts, "fits": problem is None, "problem": problem}


def _dtype_of(config: Config) -> torch.dtype:
    """The dtype in config.json, if valid."""
    name = config.get("dtype") or config.get("torch_dtype")
    try:
        return dtype_named(name) or torch.float32
    except ValueError:
        return torch.float32


def _work(
    model: PreTrainedModel,
    report: Report,
    context: int | None,
    batch: int,
    tiles: int | None,
    dtype: str,
) -> Work:
    spec = model.spec
    if context is not None and spec.text is None:
        raise ValueError("--context needs a decoder, and this model has none")
    if tiles is not None and spec.encoder is None:
        raise ValueError("--tiles needs images, and this model takes none")
    most = spec.text.max_position_embeddings if spec.text else 0
    return Work(
        context=min(_CONTEXT, most) if context is None else context,
        batch=batch,
        tiles=(spec.vision.max_num_tiles if spec.has_tiles else int(spec.encoder is not None))
        if tiles is None
        else tiles,
        dtype=report.dtype if dtype == "auto" else getattr(torch, dtype),
    )


def _made_of(spec: ModelSpec) -> str:
    decoder = None if spec.text is None else f"{spec.text.num_hidden_layers}-layer decoder"
    if crossed := spec.text and spec.text.cross_attention_layers:
        decoder += f", {len(crossed)} of them cross-attention"
    parts = (
        ("vision encoder", spec.encoder),
        ("pooling", spec.pooling),
        ("projector", spec.projector),
    )
    return " + ".join(
        [*(f"{kind} {part}" for part, kind in parts if kind), *filter(None, [decoder])]
    )


def _sizes(spec: ModelSpec, tiles: int) -> dict[str, int]:
    """Sizes by their names in config.json."""
    sizes = {}
    if spec.encoder is not None:
        names = (
            "hidden_size",
            "num_hidden_layers",
            "image_size",
            "patch_size",
            *(("max_num_tiles",) * (spec.has_tiles)),
        )
        sizes |= {f"vision {name}": getattr(spec.vision, name) for name in names}
        sizes["features of a row's images"] = image_tokens(spec, tiles)
    if spec.text is not None:
        names = (
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
        )
        sizes |= {name: getattr(spec.text, name) for name in (*names, "max_position_embeddings")}
    return sizes


def _page(found: dict[str, Any]) -> str:
    work = found["work"]
    asked = (
        f"context {work['context']}, batch {work['batch']}, tiles {work['tiles']}, {work['dtype']}"
    )
    faults = [
        f"  {kind} ({len(found[kind])}): "
        f"{', '.join(found[kind][:_SHOWN])}{' ...' * (len(found[kind]) > _SHOWN)}"
        for kind in ("missing", "unexpected", "of another shape or kind", "given twice")
        if found[kind]
    ]
    faults += [f"  {refused_pickle(name)}" for name in found["pickles"][:_SHOWN]]
    return "\n".join(
        [
            f"{found['folder']}: {found['family']}, {found['made of']}",
            *_table("sizes", {name: str(size) for name, size in found["sizes"].items()}),
            *_table(
                "elements, by the type they are read as",
                {name: f"{count:,}" for name, count in found["read as"].items()},
            ),
            *_table(
                "weights in the files, by part and type",
                {
                    f"{part}, {kind}": bytes_text(size)
                    for part, types in found["stored"].items()
                    for kind, size in types.items()
                },
            ),
            *_table(
                "parameters", {name: f"{count:,}" for name, count in found["parameters"].items()}
            ),
            *_adapter(found["adapter"]),
            *_table(
                f"memory ({asked})",
                {name: bytes_text(count) for name, count in found["memory"].items()},
            ),
            {
                True: "loads: every tensor has its place",
                False: "would not load:",
                None: "no weights: sizes are from config.json",
            }[found["loads"]],
            *faults,
        ]
    )


def _adapter(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    if not found["fits"]:
        return [f"adapter {found['path']} does not fit: {found['problem']}"]
    rows = {
        f"{part}, {counts['layers']} layers": f"{counts['parameters']:,}"
        for part, counts in found["parts"].items()
    }
    if found["trained"]:
        rows["trained in full beside it"] = f"{found['trained_parameters']:,}"
    kind, ranks = "DoRA" if found["dora"] else "LoRA", ", ".join(found["ranks"])
    return _table(f"parameters of {found['path']} ({kind}, rank {ranks})", rows)


def _table(title: str, rows: dict[str, str]) -> list[str]:
    return [title, *(f"  {name:34}{value:>18}" for name, value in rows.items())]


def bytes_text(count: int) -> str:
    for power, unit in ((30, "GiB"), (20, "MiB")):
        if count >= 2**power:
            return f"{count / 2**power:,.2f} {unit}"
    return f"{count / 2**10:,.2f} KiB"
