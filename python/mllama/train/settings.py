"""The settings of a run: the one table of keys, which are YAML's keys and flags alike.

Imports nothing beyond the standard library until a file is read.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mllama.train.keys import (
    FLAG,
    checked,
    default_of,
    key,
    mapping,
    number,
    one_of,
    several,
    shown,
    text,
)

METHODS = ("lora", "full")
SCHEDULES = ("cosine", "linear", "constant")
CHECKPOINTS = ("gathered", "sharded")
OPTIMIZERS = ("adamw", "adamw8bit")
# The first key of each group of the help.
GROUPS = {
    "model": "model",
    "data": "data",
    "method": "what is trained",
    "epochs": "optimization",
    "output": "output",
}
TRACKERS = ("tensorboard", "wandb", "comet_ml", "trackio")  # accelerate's names
DTYPES = ("auto", "float32", "bfloat16", "float16")
WEIGHTS = ("int8", "int4", "bf16", "f16", "f32", "file")
_ALTERNATIVES = (
    ("epochs", "max_steps"),
    ("max_steps", "epochs"),
    ("eval_data", "eval_fraction"),
    ("eval_fraction", "eval_data"),
)
_OF_ADAPTERS = ("rank", "alpha", "dropout", "targets", "ranks", "rslora", "dora")
_SHARD_DTYPES = "dtype must be float32 or bfloat16 with shard"
_MOST_BYTES = 1 << 20  # of a config
_MOST = 2**31 - 1
_POSITIVE = number(int, 1, _MOST)
_COUNT = number(int, 0, _MOST)
_SHARE = number(float, 0, 1, below=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """What a run is. `load_settings` reads and checks one; values given here are checked, too.

    Raises:
        ValueError: a value is not of its key's kind, or keys exclude each other.
    """

    model: str | None = key(
        None, text("MODEL"), "a model folder, a GGUF file or a model id; none: the embedded model"
    )
    adapter: str | None = key(
        None, text("PATH"), "adapters to train further: a file of save_lora, or a PEFT folder"
    )
    weights: str | None = key(
        None, one_of(*WEIGHTS), "pack frozen weights, for less memory (QLoRA); none: as tensors"
    )
    dtype: str = key(
        "auto",
        one_of(*DTYPES),
        "dtype of the computation; auto: bfloat16 where it is fast, float16 on older GPUs, else "
        "float32",
    )
    device: str = key("auto", text("DEVICE"), "auto, cpu, cuda, cuda:1 ...")
    gradient_checkpointing: bool = key(
        False, FLAG, "recompute each layer in the backward pass: less memory, more time"
    )
    shard: bool = key(
        False,
        FLAG,
        "share the weights out among processes (FSDP2); otherwise each has all of them (DDP)",
    )
    data: str = key(
        dataclasses.MISSING,
        text("DATA"),
        "training data: JSONL, CSV, a folder of class folders of images, or a datasets id",
    )
    eval_data: str | None = key(None, text("DATA"), "evaluation data, in the same forms")
    eval_fraction: float = key(0.0, _SHARE, "share of the training data kept for evaluation")
    image_folder: str | None = key(
        None, text("DIR"), "folder of the images that data names; none: the folder of the data"
    )
    question: str | None = key(
        None, text("TEXT"), "the question of every image, for a folder of class folders"
    )
    split: str | None = key(None, text("NAME"), "the split of a datasets id that is trained on")
    eval_split: str | None = key(None, text("NAME"), "the split of eval_data, a datasets id")
    skip_bad_rows: bool = key(
        False, FLAG, "skip rows that cannot be read, and count them; otherwise they end the run"
    )
    max_length: int | None = key(
        None, _POSITIVE, "tokens of a row, longer ones are cut; none: no row is cut"
    )
    pack: bool = key(False, FLAG, "put several short examples in one row of max_length tokens")
    workers: int = key(0, _COUNT, "processes that prepare batches; 0: the training process")
    cache_features: str | None = key(
        None, text("DIR"), "keep a frozen image encoder's features in files of this folder"
    )
    method: str = key("lora", one_of(*METHODS), "lora: adapters; full: every parameter")
    rank: int = key(16, _POSITIVE, "rank of adapters")
    alpha: float = key(32.0, number(float, 0, above=True), "adapters are scaled by alpha / rank")
    dropout: float = key(0.0, _SHARE, "dropout of the adapters' inputs")
    targets: tuple[str, ...] = key(
        ("attn", "mlp"),
        several(text(""), "SCOPE"),
        "layers with adapters: vision, projector, cross_attn, attn, mlp, all-linear, re:..., names",
    )
    ranks: dict[str, int] = key(
        {}, mapping(_POSITIVE, "NAME=N"), "other ranks, by ends or patterns of layers' names"
    )
    rslora: bool = key(False, FLAG, "scale adapters by alpha / sqrt(rank)")
    dora: bool = key(False, FLAG, "train the magnitude of each row of adapted weights, too (DoRA)")
    trained_modules: tuple[str, ...] = key(
        (), several(text(""), "NAME"), "modules trained in full beside the adapters"
    )
    epochs: float = key(1.0, number(float, 0, above=True), "passes over the training data")
    max_steps: int | None = key(None, _POSITIVE, "optimizer steps, in place of epochs")
    batch_size: int = key(1, _POSITIVE, "examples per forward pass and process")
    accumulation: int = key(1, _POSITIVE, "forward passes per optimizer step")
    optimizer: str = key(
        "adamw", one_of(*OPTIMIZERS), "adamw8bit: 8-bit states, by bitsandbytes on a GPU"
    )
    learning_rate: float = key(2e-4, number(float, 0, above=True), "largest learning rate")
    schedule: str = key(
        "cosine", one_of(*SCHEDULES), "how the learning rate falls after the warm-up"
    )
    warmup: float = key(
        0.03, number(float, 0), "steps of warm-up: below 1 a share of all steps, else a number"
    )
    min_learning_rate: float = key(0.0, number(float, 0), "learning rate at the end")
    weight_decay: float = key(0.0, number(float, 0), "AdamW's decay of matrices, not of vectors")
    max_grad_norm: float | None = key(
        1.0,
        number(float, 0, above=True),
        "gradients are clipped to this norm; null: they are not",
        or_none=True,
    )
    seed: int = key(0, number(int, 0, 2**32 - 1), "seed of adapters, dropout and the rows' order")
    output: str = key("runs/train", text("DIR"), "folder of everything that the run writes")
    log_every: int = key(1, _POSITIVE, "steps between lines of the log")
    eval_every: int | None = key(
        None, _POSITIVE, "steps between evaluations; none: ten in the run, if there is eval data"
    )
    save_every: int | None = key(None, _POSITIVE, "steps between checkpoints; none: ten in the run")
    checkpoint: str = key(
        "gathered",
        one_of(*CHECKPOINTS),
        "with shard; gathered: the first process writes whole tensors; sharded: each its own part",
    )
    keep: int = key(2, _POSITIVE, "checkpoints kept, beside the best one")
    samples: int = key(4, _COUNT, "answers shown at each evaluation, with their images")
    trackers: tuple[str, ...] = key(
        (), several(one_of(*TRACKERS), "NAME"), f"any of {', '.join(TRACKERS)}"
    )
    run_name: str | None = key(None, text("NAME"), "name of the run for trackers")

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value = checked(field, getattr(self, field.name), field.name)
            object.__setattr__(self, field.name, value)
        _check_together(self)


def keys() -> dict[str, dataclasses.Field]:
    """Every key, in the table's order."""
    return {field.name: field for field in dataclasses.fields(TrainSettings)}


def load_settings(path: Any = None, overrides: Mapping[str, Any] | None = None) -> TrainSettings:
    """The settings of a YAML file.

    Args:
        path: the file, or None for `overrides` alone. Paths in it are relative to the current
            folder, as those of flags.
        overrides: key -> value in place of the file's. max_steps also replaces epochs, eval_data
            eval_fraction, and the reverse.

    Raises:
        FileNotFoundError: the file, or one that a key names, does not exist.
        ValueError: a key is unknown or repeated, has a value that is not of its kind, lacks one, or
            excludes another.
    """
    found = {} if path is None else read_config(Path(path))
    where = "settings" if path is None else str(path)
    overrides = overrides or {}
    for one, other in _ALTERNATIVES:
        if one in overrides and other not in overrides:
            found.pop(other, None)
    found |= overrides
    known = keys()
    if unknown := [name for name in found if name not in known]:
        raise ValueError(
            f"{where}: unknown key {shown(unknown[0])}{_nearest(unknown[0])}; the keys are "
            f"{', '.join(known)}"
        )
    if "data" not in found:
        raise ValueError(f"{where}: the key data is missing")
    try:
        settings = TrainSettings(**found)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    _check_files(settings, where)
    return settings


def read_config(path: Path) -> dict[str, Any]:
    """The keys of a config, as they are there.

    Raises:
        FileNotFoundError: the file does not exist.
        ValueError: it is not YAML of keys with values, or too large.
    """
    from mllama.train.yaml_file import read_yaml

    if not path.is_file():
        raise FileNotFoundError(f"no config {path}")
    if path.stat().st_size > _MOST_BYTES:
        raise ValueError(f"{path}: a config has at most {_MOST_BYTES} bytes")
    found = read_yaml(path)
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must be keys with values, such as 'data: photos.jsonl'")
    return found


def _nearest(name: Any) -> str:
    import difflib

    near = difflib.get_close_matches(str(name)[:60], list(keys()), 1)
    return f", did you mean {near[0]}?" if near else ""


def _check_together(settings: TrainSettings) -> None:
    """Raise ValueError for keys that exclude each other or have no effect."""
    given = _changed(settings)
    if settings.method == "full":
        for name in _OF_ADAPTERS:
            _refuse(name in given, f"{name} is for adapters, and method is full")
        _refuse("trained_modules" in given, "trained_modules has no effect: method is full")
        _refuse("adapter" in given, "adapter must be merged first: method is full")
        _refuse("weights" in given, "weights cannot be packed with method: full, which trains them")
        _refuse("cache_features" in given, "cache_features needs a frozen encoder: method is full")
    elif settings.adapter is not None:
        for name in (*_OF_ADAPTERS, "trained_modules"):
            _refuse(name in given, f"{name} is the adapter's own: leave it out beside adapter")
    else:
        _refuse(not settings.targets, "targets must name what gets adapters")
    has_eval = settings.eval_data is not None or settings.eval_fraction > 0
    both = settings.eval_data is not None and settings.eval_fraction > 0
    _refuse(both, "eval_fraction must be 0 beside eval_data")
    _refuse("eval_split" in given and settings.eval_data is None, "eval_split needs eval_data")
    _refuse("eval_every" in given and not has_eval, "eval_every needs eval_data or eval_fraction")
    shows = "samples" in given and settings.samples > 0
    _refuse(shows and not has_eval, "samples needs eval_data or eval_fraction")
    _refuse(settings.shard and settings.dtype in ("auto", "float16"), _SHARD_DTYPES)
    _refuse(settings.shard and "weights" in given, "weights cannot be packed with shard")
    _refuse(settings.shard and "cache_features" in given, "cache_features cannot be with shard")
    # its kernels get the shards as if they were whole: bitsandbytes' issue 1633
    eight = settings.optimizer == "adamw8bit"
    _refuse(settings.shard and eight, "optimizer adamw8bit cannot be with shard: use adamw")
    _refuse("checkpoint" in given and not settings.shard, "checkpoint: sharded needs shard")
    _refuse(settings.pack and settings.max_length is None, "pack needs max_length")
    _refuse("epochs" in given and "max_steps" in given, "epochs has no effect beside max_steps")
    if settings.schedule == "constant":
        _refuse(settings.min_learning_rate > 0, "min_learning_rate needs a falling schedule")
    lowest, highest = settings.min_learning_rate, settings.learning_rate
    _refuse(lowest > highest, f"min_learning_rate is above learning_rate, {lowest} and {highest}")
    whole = settings.warmup < 1 or settings.warmup == int(settings.warmup)
    _refuse(not whole, f"warmup must be below 1 or a whole number, got {settings.warmup}")
    _refuse("run_name" in given and not settings.trackers, "run_name is for trackers")


def _refuse(wrong: bool, why: str) -> None:
    if wrong:
        raise ValueError(why)


def _changed(settings: TrainSettings) -> set[str]:
    """Keys whose value is not the default."""
    return {name for name, field in keys().items() if getattr(settings, name) != default_of(field)}


def _check_files(settings: TrainSettings, where: str) -> None:
    """Raise FileNotFoundError for a file of a key that does not exist. A datasets id and a model id
    are looked up where they are loaded. os.path takes any name, pathlib raises for long ones.
    """
    for name in ("data", "eval_data"):
        value = getattr(settings, name)
        is_file = value is not None and (
            Path(value).suffix in (".jsonl", ".ndjson", ".json", ".csv")
            or value.startswith((".", "/", "~"))
        )
        if is_file and not os.path.exists(value):
            raise FileNotFoundError(f"{where}: {name}: no such file: {value}")
    if settings.image_folder is not None and not os.path.isdir(settings.image_folder):
        raise FileNotFoundError(f"{where}: image_folder: no such folder: {settings.image_folder}")
    if settings.adapter is not None and not os.path.exists(settings.adapter):
        raise FileNotFoundError(f"{where}: adapter: no such file: {settings.adapter}")
