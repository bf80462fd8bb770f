"""The memory that a run needs, by part, and the settings that would need less."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mllama.data.collate import Collator
from mllama.data.rows import Example
from mllama.device import choose_device, dtype_name
from mllama.model.memory import Work, memory_needed
from mllama.plan.blueprint import lay_out_model
from mllama.plan.fakes import OPTIMIZER, FakeSteps
from mllama.plan.machine import available_memory, resident_memory
from mllama.train.batches import Batch, count_trained
from mllama.train.optimizer import make_optimizer
from mllama.train.prepare import compute_dtype
from mllama.train.rows import open_rows
from mllama.train.settings import TrainSettings

LIBRARIES = "Python and libraries"
ROWS = 100  # of the data, that a plan looks at
# Of the memory, what parts may fill: allocators keep free pieces between tensors.
_FILLED = 0.9
_ANSWER = 64  # tokens of a sample's answer
# bitsandbytes' states, of AdamW's 8 bytes for a parameter: two of 8 bits, with float32 scales for
# 256 of them.
_EIGHT_BITS = (2 + 2 * 4 / 256) / 8


@dataclass(frozen=True)
class Switch:
    """Other settings, and what they would need.

    Attributes:
        changes: the keys that differ, with their values.
        total: bytes.
        fits: whether that fits.
    """

    changes: dict[str, Any]
    total: int
    fits: bool


@dataclass(frozen=True)
class Plan:
    """The memory of a run.

    Attributes:
        device: where it runs.
        memory: bytes that are free there, or were given; None if the system does not say.
        parts: bytes by part at the peak of a step; on a CPU with those of Python and its libraries.
        total: their sum.
        samples: bytes while a sample's answer is generated, which is not at that moment; its cache
            of keys and values.
        fits: whether the larger one takes at most nine tenths of the memory.
        work: what a forward pass computes: rows, tokens, images, labels, and the dtype.
        switches: settings that would need less, each alone and then, if none fits, together. Empty
            where the run fits, unless all were asked for.
    """

    device: str
    memory: int | None
    parts: dict[str, int]
    total: int
    samples: dict[str, int]
    fits: bool | None
    work: dict[str, Any]
    switches: list[Switch]


def plan(
    settings: TrainSettings,
    memory: int | None = None,
    length: int | None = None,
    every_switch: bool = False,
) -> Plan:
    """What a run's steps need, computed from shapes alone: no weight is read or allocated.

    A step is run with fake tensors, so that what is counted is what training allocates: within 10 %
    of the measured peak of allocated tensors. The batch has the longest of the first 100 rows. On a
    CPU, malloc keeps freed pieces beside that.

    Args:
        settings: the run's.
        memory: bytes that there are. Default: what is free on the device.
        length: tokens of every row, in place of the data's.
        every_switch: try the switches where the run fits, too.

    Raises:
        TypeError, ValueError, FileNotFoundError: as `mllama.train.run.train` for the same settings;
            length is shorter than the rows, or longer than rows can be; weights is "file"; shard is
            set.
    """
    if settings.shard:
        raise ValueError("a plan is of a process with all weights: shard must be false")
    device = choose_device(settings.device)
    if memory is None:
        memory = available_memory(device)
    rows = _Rows(settings, length)
    parts, work, samples = _count(settings, rows, device)
    budget = None if memory is None else int(memory * _FILLED)

    def fits(total: int) -> bool | None:
        return None if budget is None else total <= budget

    total = max(sum(parts.values()), sum(samples.values()))
    switches = []
    if every_switch or fits(total) is False:
        switches = _switches(settings, rows, device, budget or 0)
    return Plan(
        str(device),
        memory,
        parts,
        sum(parts.values()),
        samples,
        fits(total),
        work | {"weights": settings.weights or work["dtype"]},
        switches,
    )


class _Rows:
    """The longest rows of a run's data; for a given length the longest one alone.

    Attributes:
        looked_at: number of rows that were read.
        libraries: bytes of this process, which has all libraries of training and no weights.
    """

    def __init__(self, settings: TrainSettings, length: int | None):
        self._length = length
        model, processor = lay_out_model(settings)
        collator = Collator(model, processor, settings.max_length)
        first = open_rows(settings, collator, most=ROWS)[:ROWS]
        self.looked_at = len(first)
        self._examples: list[Example] = sorted(
            first, key=lambda example: len(collator.encode(example)), reverse=True
        )
        self.libraries = resident_memory()

    def batch(self, settings: TrainSettings, model: Any, processor: Any) -> Batch:
        """A batch of the longest rows, the first ones again if there are too few."""
        size, rows = settings.batch_size, self._examples
        if self._length is not None:
            rows = rows[:1]
        chosen = (rows * math.ceil(size / len(rows)))[:size]
        collator = Collator(model, processor, settings.max_length, settings.pack)
        batch = collator(chosen)
        if self._length is None:
            return batch
        most = settings.max_length or model.spec.text.max_position_embeddings
        return _lengthened(batch, self._length, most)


def _lengthened(batch: Batch, length: int, most: int) -> Batch:
    """The last column of tensors of tokens again and again, as trained tokens."""
    now = batch["input_ids"].shape[1]
    if length < now:
        raise ValueError(f"length must be at least {now}, the tokens of the longest row: {length}")
    if length > most:
        raise ValueError(f"length must be at most {most}, as a run's rows are: {length}")
    longer = {}
    for name, value in batch.items():
        if value.shape[:2] == batch["input_ids"].shape and name != "pixel_values":
            more = value[:, -1:].expand(-1, length - now, *value.shape[2:])
            value = torch.cat([value, more], 1)
        longer[name] = value
    if "position_ids" in batch:
        added = torch.arange(1, length - now + 1)
        longer["position_ids"] = torch.cat(
            [batch["position_ids"], batch["position_ids"][:, -1:] + added], 1
        )
    return longer


def _count(
    settings: TrainSettings, rows: _Rows, device: torch.device
) -> tuple[dict[str, int], dict[str, Any], dict[str, int]]:
    """Bytes by part, the work of a pass, and bytes of a sample's answer."""
    model, processor = lay_out_model(settings)
    batch = rows.batch(settings, model, processor)
    dtype = compute_dtype(settings, model)
    samples = _samples(settings, model, batch, dtype)
    eight_bits = settings.optimizer == "adamw8bit"
    counted = dataclasses.replace(settings, optimizer="adamw") if eight_bits else settings

    def make(parameters: Mapping[str, nn.Parameter]) -> torch.optim.Optimizer:
        return make_optimizer(parameters, counted)

    steps = FakeSteps(model, dtype, make, device.type)
    parts = steps.peak(
        batch, settings.accumulation, settings.max_grad_norm, settings.cache_features is not None
    )
    if eight_bits:
        parts[OPTIMIZER] = int(parts[OPTIMIZER] * _EIGHT_BITS)
    if device.type == "cpu":
        parts[LIBRARIES] = rows.libraries
    work = {
        "rows": len(batch["input_ids"]),
        "tokens": batch["input_ids"].shape[1],
        "images": len(batch["pixel_values"]) if "pixel_values" in batch else 0,
        "labels": count_trained(batch),
        "accumulation": settings.accumulation,
        "looked at": rows.looked_at,
        "dtype": dtype_name(dtype),
    }
    return parts, work, samples


def _samples(
    settings: TrainSettings, model: Any, batch: Batch, dtype: torch.dtype
) -> dict[str, int]:
    """Bytes while an answer is shown to the user; none where there is no evaluation."""
    evaluated = settings.eval_data is not None or settings.eval_fraction > 0
    if not (evaluated and settings.samples):
        return {}
    spec = model.spec
    tiles = 0
    if spec.encoder is not None:
        tiles = spec.vision.max_num_tiles if spec.has_tiles else 1
    context = batch["input_ids"].shape[1] + _ANSWER
    needed = memory_needed(model, Work(context, 1, tiles, dtype))
    needed["weights"] = sum(one.nbytes for one in (*model.parameters(), *model.buffers()))
    return needed


def _switches(
    settings: TrainSettings, rows: _Rows, device: torch.device, budget: int
) -> list[Switch]:
    """Each change alone; then, if none fits, one after the other together until they do."""

    def tried(changes: dict[str, Any]) -> Switch:
        parts, _, samples = _count(dataclasses.replace(settings, **changes), rows, device)
        total = max(sum(parts.values()), sum(samples.values()))
        return Switch(changes, total, total <= budget)

    alone = _changes(settings, rows, device)
    found = [tried(changes) for changes in alone]
    found.sort(key=lambda switch: switch.total)
    if not found or any(switch.fits for switch in found):
        return found
    first, *rest = alone
    together = dict(first)
    for changes in rest:
        if together.keys() & changes.keys():
            continue  # int8 after int4
        together |= changes
        found.append(tried(dict(together)))
        if found[-1].fits:
            break
    return found


def _changes(settings: TrainSettings, rows: _Rows, device: torch.device) -> list[dict[str, Any]]:
    """Changes that leave what is learned nearly the same, the least costly first."""
    model, processor = lay_out_model(settings)
    found: list[dict[str, Any]] = []
    if not settings.gradient_checkpointing:
        found.append({"gradient_checkpointing": True})
    if settings.batch_size > 1:
        passes = settings.batch_size * settings.accumulation
        found.append({"batch_size": 1, "accumulation": passes})
    frozen = settings.method == "lora" and not any(
        parameter.requires_grad
        for _, module in (model.encoder_modules() if model.spec.encoder else ())
        for parameter in module.parameters()
    )
    batch = rows.batch(settings, model, processor)
    if frozen and settings.cache_features is None and "pixel_values" in batch:
        found.append({"cache_features": "features"})
    if settings.method == "full":
        found.append({"method": "lora"})
    elif settings.weights is None:
        found += [{"weights": "int4"}, {"weights": "int8"}]
    if settings.optimizer == "adamw" and device.type == "cuda":
        found.append({"optimizer": "adamw8bit"})
    return found
