"""Everything that a run works on, built from its settings."""

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.data import Subset

from mllama.data.collate import Collator
from mllama.data.features import FeatureCache
from mllama.data.rows import Example
from mllama.device import choose_device
from mllama.train import random_state
from mllama.train.course import Course, held_out
from mllama.train.optimizer import make_optimizer
from mllama.train.prepare import compute_dtype, prepare_model, trained_parameters
from mllama.train.replica import Replica
from mllama.train.rows import open_rows
from mllama.train.settings import TrainSettings
from mllama.train.sharding import shard


@dataclass
class Setup:
    """What a run works on.

    Attributes:
        accelerator: accelerate's, for processes and trackers.
        model: the model; `wrapped` is what is called, DDP's module around it if there are several
            processes that do not share its weights out.
        dtype: of the computation.
        parameters: what is trained, by name.
        examples, eval_examples: the rows; no eval_examples: an empty list.
        bad_rows: what was wrong with each row that was skipped.
    """

    settings: TrainSettings
    accelerator: Any
    model: Any
    wrapped: Any
    processor: Any
    dtype: torch.dtype
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    scaler: Any
    collator: Collator
    features: FeatureCache | None
    examples: Sequence[Example]
    eval_examples: Sequence[Example]
    bad_rows: list[str]
    course: Course

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return next(self.model.parameters()).device

    def close(self) -> None:
        """End trackers and processes. DDP's module goes first: gloo's group, deleted with the last
        module that holds it, joins a thread that may wait for the interpreter's lock.
        """
        self.wrapped = self.model
        self.accelerator.free_memory()
        self.accelerator.end_training()


def set_up(settings: TrainSettings, accelerator: Any, device: torch.device) -> Setup:
    """Load model and data, and build what trains them.

    Args:
        settings: the run's settings.
        accelerator, device: as `make_accelerator` returns them.

    Raises:
        TypeError, ValueError, FileNotFoundError: model, data or settings do not fit each other.
    """
    quiet = not accelerator.is_main_process
    place = torch.device("cpu") if settings.shard else device
    model, processor, _ = prepare_model(settings, place, quiet)
    if settings.shard:
        shard(model, device)
    parameters = trained_parameters(model)
    collator = Collator(model, processor, settings.max_length, settings.pack)
    examples, eval_examples, bad_rows = _open_data(settings, collator)
    features = None
    if settings.cache_features is not None:
        features = FeatureCache(model, settings.cache_features)
    dtype = compute_dtype(settings, model)
    wrapped = model
    if not settings.shard:
        alone = accelerator.num_processes == 1
        called = model if alone else Replica(model)
        wrapped = accelerator.prepare_model(called, device_placement=False)
    random_state.seed(settings.seed + accelerator.process_index)  # for dropout
    return Setup(
        settings=settings,
        accelerator=accelerator,
        model=model,
        wrapped=wrapped,
        processor=processor,
        dtype=dtype,
        parameters=parameters,
        optimizer=make_optimizer(parameters, settings),
        scaler=torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
        collator=collator,
        features=features,
        examples=examples,
        eval_examples=eval_examples,
        bad_rows=bad_rows,
        course=Course(
            settings, len(examples), accelerator.num_processes, evaluated=len(eval_examples) > 0
        ),
    )


def _check_packages(settings: TrainSettings) -> None:
    for name in ("accelerate", "matplotlib", "yaml"):
        if importlib.util.find_spec(name) is None:
            raise ImportError(f'training needs {name}: pip install "mllama[train]"')
    from accelerate.tracking import get_available_trackers

    available = {str(tracker) for tracker in get_available_trackers()}
    if missing := [name for name in settings.trackers if name not in available]:
        raise ImportError(f"trackers: {missing[0]} is not installed: pip install {missing[0]}")


def make_accelerator(settings: TrainSettings) -> tuple[Any, torch.device]:
    """accelerate's Accelerator, and this process's device.

    Raises:
        ImportError: a package that the settings need is missing.
        ValueError: the device is not here, or is one for several processes.
    """
    _check_packages(settings)
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration

    device = choose_device(settings.device)
    # Images may be absent from a batch; packed weights are buffers, and never change.
    wrapping = DistributedDataParallelKwargs(find_unused_parameters=True, broadcast_buffers=False)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision="no",  # autocast and loss scaling are the loop's own
        log_with=list(settings.trackers) or None,
        project_config=ProjectConfiguration(settings.output, f"{settings.output}/trackers"),
        kwargs_handlers=[wrapping],
    )
    if settings.shard and accelerator.num_processes == 1:
        raise ValueError("shard needs several processes: start it with torchrun")
    if accelerator.num_processes > 1:
        if settings.device not in ("auto", device.type):
            raise ValueError(
                f"device must be auto, cpu or cuda with several processes, got {settings.device}"
            )
        device = accelerator.device
    return accelerator, device


def _open_data(
    settings: TrainSettings, collator: Collator
) -> tuple[Sequence[Example], Sequence[Example], list[str]]:
    """The rows to train on, those to evaluate, and what was wrong with those that were skipped."""
    found = open_rows(settings, collator)
    bad_rows = list(found.bad_rows)
    if settings.eval_data is not None:
        rest = open_rows(settings, collator, "eval_data")
        return found, rest, bad_rows + rest.bad_rows
    if not settings.eval_fraction:
        return found, [], bad_rows
    kept, apart = held_out(len(found), settings.eval_fraction, settings.seed)
    return Subset(found, kept), Subset(found, apart), bad_rows  # type: ignore[return-value]
