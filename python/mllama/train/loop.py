"""The training loop: steps, evaluations, checkpoints."""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from mllama.nn.wrappers import put, unwrapped, whole
from mllama.train import random_state
from mllama.train.batches import Batch, count_tokens, count_trained, load_batches
from mllama.train.checkpoints import Checkpoint, CheckpointFolder
from mllama.train.log import Log
from mllama.train.optimizer import load_optimizer_state, optimizer_state
from mllama.train.prepare import autocast
from mllama.train.progress import TrainingProgress, peak_memory
from mllama.train.reached import Unreached, check_updated
from mllama.train.setup import Setup
from mllama.train.sharding import without_sync
from mllama.train.stopping import Stopping

_LOWEST_SCALE = 1.0  # of the loss in float16; it begins at 65,536
_CHECKED_AFTER = 100  # steps at most, until every parameter must have had a gradient


@dataclass
class State:
    """Where a run stands; stored in checkpoints.

    Attributes:
        step: steps that were made.
        trained_tokens: labels of all steps.
        loss: of the last step, the mean over its labels.
        window_loss, window_tokens: sum of the loss over the labels since the last entry of the log,
            and their number.
        eval_loss, best_loss, best_step: the last evaluation's loss, and the best one's.
    """

    step: int = 0
    trained_tokens: int = 0
    loss: float = math.nan
    window_loss: float = 0.0
    window_tokens: int = 0
    eval_loss: float | None = None
    best_loss: float | None = None
    best_step: int | None = None


class Loop:
    """Trains.

    Args:
        setup: what is trained, on what.
        checkpoints: where checkpoints go.
        log: the log; of the first process alone.
        progress: what is shown.
        on_evaluation: called after an evaluation, with the model in eval mode.
    """

    def __init__(
        self,
        setup: Setup,
        checkpoints: CheckpointFolder,
        log: Log | None,
        progress: TrainingProgress,
        on_evaluation: Callable[[int], None],
    ):
        self.setup, self.checkpoints, self.log, self.progress = setup, checkpoints, log, progress
        self.on_evaluation = on_evaluation
        self.state = State()
        self._unreached = Unreached(setup)
        self._window_start, self._window_read = time.perf_counter(), 0

    def run(self, stopping: Stopping) -> None:
        """Make the steps that are left, until `stopping` has a signal.

        Raises:
            ValueError: a step has nothing to train on or a loss that is not a number, a parameter
                gets no gradient, or a batch cannot be made.
            OSError: a checkpoint cannot be written.
        """
        course, accelerator = self.setup.course, self.setup.accelerator
        steps = range(self.state.step + 1, course.steps + 1)
        batches = self._batches(steps)
        self.setup.model.train()
        for step in steps:
            passes = list(islice(batches, self.setup.settings.accumulation))
            counts = torch.tensor(
                [sum(map(count_trained, passes)), sum(map(count_tokens, passes)), 0],
                device=self.setup.device,
            )
            counts[2] = stopping.signal or 0
            trained, read, stop = accelerator.reduce(counts, "sum").tolist()
            self._check_images(step, passes)
            self._step(step, passes, trained)
            self._note(step, trained, read)
            self._check_gradients(step)
            is_best = course.is_evaluated(step) and self._evaluate(step)
            # Several processes stop together, one step after the signal reached one of them.
            stop = stop or (accelerator.num_processes == 1 and stopping.signal is not None)
            if course.is_saved(step) or is_best or stop:
                self.save()
            if stop:
                return

    def _batches(self, steps: range) -> Iterator[Batch]:
        course, process = self.setup.course, self.setup.accelerator.process_index
        indices = (rows for step in steps for rows in course.batches(step, process))
        workers = self.setup.settings.workers
        return load_batches(self.setup.examples, self.setup.collator, indices, workers)

    def _step(self, step: int, passes: list[Batch], trained: int) -> None:
        """One optimizer step.

        The loss is the mean over all labels of the step: each pass contributes its sum, divided by
        their number.
        """
        setup = self.setup
        if not trained:
            raise ValueError(f"step {step}: its rows have no token to train on")
        sums = torch.zeros(2, device=setup.device)  # the loss, and passes with gradients
        for index, batch in enumerate(passes):
            is_last = index == len(passes) - 1
            with nullcontext() if is_last else self._without_sync():
                sums += self._pass(batch, trained)
        self.state.loss, reached = setup.accelerator.reduce(sums, "sum").tolist()
        if not math.isfinite(self.state.loss):
            raise ValueError(f"step {step}: the loss is {self.state.loss}; {self._way_out()}")
        if not reached:  # DDP's gradients are zeros then, in place of none
            setup.optimizer.zero_grad()
        self._update(step)

    def _check_images(self, step: int, passes: list[Batch]) -> None:
        """Processes that share weights have to compute the same layers at the same time."""
        if self.setup.settings.shard:
            found = torch.tensor(["pixel_values" in batch for batch in passes], dtype=torch.int64)
            sums = self.setup.accelerator.reduce(found.to(self.setup.device), "sum")
            if not bool(((sums == 0) | (sums == self.setup.accelerator.num_processes)).all()):
                raise ValueError(
                    f"step {step}: with shard all processes need rows with images, or none does; "
                    "raise batch_size, or train rows without images apart"
                )

    def _without_sync(self) -> Any:
        if self.setup.settings.shard:
            return without_sync(self.setup.model)
        return self.setup.accelerator.no_sync(self.setup.wrapped)

    def _pass(self, batch: Batch, trained: int) -> torch.Tensor:
        """Add the gradients of a pass. Returns its part of the loss, and 1 if there are gradients:
        nothing that is trained is on the way from an adapted encoder to the loss of rows without
        images. The graph, which holds inputs of checkpointed layers, ends here.
        """
        setup = self.setup
        loss = self._forward(batch, num_items_in_batch=trained).loss
        found = torch.stack((loss.detach().float(), torch.zeros_like(loss, dtype=torch.float32)))
        if not loss.requires_grad:  # with shard it is so in all processes
            return found
        # processes' gradients are averaged
        setup.scaler.scale(loss * setup.accelerator.num_processes).backward()
        if getattr(unwrapped(setup.wrapped), "reached", True):
            self._unreached.note()
            found[1] = 1
        return found

    def _update(self, step: int) -> None:
        setup, most = self.setup, self.setup.settings.max_grad_norm
        if all(one.grad is None for one in setup.parameters.values()):  # see `_pass`
            self._grad_norm = 0.0
            return
        setup.scaler.unscale_(setup.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            setup.parameters.values(), math.inf if most is None else most
        )
        self._grad_norm = whole(norm).item()
        if not math.isfinite(self._grad_norm):
            if not setup.scaler.is_enabled():
                raise ValueError(f"step {step}: the gradient is not finite; {self._way_out()}")
            if setup.scaler.get_scale() < _LOWEST_SCALE:
                raise ValueError(
                    f"step {step}: float16 gradients are not finite however the loss is scaled; "
                    f"{self._way_out()}"
                )
        for group in setup.optimizer.param_groups:
            group["lr"] = setup.course.learning_rate(step)
        setup.scaler.step(setup.optimizer)
        setup.scaler.update()
        setup.optimizer.zero_grad()

    def _way_out(self) -> str:
        kept = self.checkpoints.steps()
        last = (
            f"the last checkpoint is {self.checkpoints.path(kept[-1])}" if kept else "no checkpoint"
        )
        return f"{last}; a lower learning_rate may help, or dtype float32"

    def _forward(self, batch: Batch, **options: Any) -> Any:
        """The model's output for a batch, on the model's device; no logits are kept."""
        device = self.setup.device
        batch = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
        if self.setup.features is not None:
            batch = self.setup.features.replace(batch)
        with self._autocast():
            called = self.setup.wrapped if torch.is_grad_enabled() else self.setup.model
            return called(**batch, logits_to_keep=None, **options)

    def _autocast(self) -> torch.autocast:
        return autocast(self.setup.device.type, self.setup.dtype)

    def _note(self, step: int, trained: int, read: int) -> None:
        """Count a step, log it and show it."""
        state, setup = self.state, self.setup
        state.step = step
        state.trained_tokens += trained
        state.window_loss += state.loss * trained
        state.window_tokens += trained
        self._window_read += read
        spent = time.perf_counter() - self._window_start
        memory = peak_memory(setup.device)
        speed = self._window_read / spent
        self.progress.update(step, state.loss, speed, memory)
        if step % setup.settings.log_every and step != setup.course.steps:
            return
        entry = {
            "step": step,
            "epoch": setup.course.epoch(step),
            "loss": state.window_loss / state.window_tokens,
            "learning_rate": setup.course.learning_rate(step),
            # JSON has no number for that of a step that is skipped
            "grad_norm": self._grad_norm if math.isfinite(self._grad_norm) else None,
            "trained_tokens": state.trained_tokens,
            "tokens_per_second": round(speed, 1),
            "peak_memory": memory,
        }
        self._add(entry)
        state.window_loss, state.window_tokens = 0.0, 0
        self._window_start, self._window_read = time.perf_counter(), 0

    def _add(self, entry: dict[str, Any]) -> None:
        """Write an entry to the log and the trackers."""
        values = {k: value for k, value in entry.items() if k != "step" and value is not None}
        self.setup.accelerator.log(values, step=entry["step"])
        if self.log is not None:
            self.log.add(entry)

    def _check_gradients(self, step: int) -> None:
        """Raise ValueError if an adapter is not reached by the data of an epoch, in any process; or
        if no step of the run changed anything.
        """
        course = self.setup.course
        if step == course.steps:
            check_updated(self.setup, step)
        if step != min(course.steps_per_epoch, course.steps, _CHECKED_AFTER):
            return
        self._unreached.share()
        self._unreached.check(step)
        if self._unreached.names:
            self.progress.say(f"{len(self._unreached.names)} parameters are not used by the data")

    @torch.no_grad()
    def _evaluate(self, step: int) -> bool:
        """Evaluate, and return whether it is the best evaluation so far."""
        setup, size = self.setup, self.setup.settings.batch_size
        started = time.perf_counter()
        setup.model.eval()
        rows = list(range(len(setup.eval_examples)))
        passes = [rows[start : start + size] for start in range(0, len(rows), size)]
        shared, processes = not setup.settings.shard, setup.accelerator.num_processes
        # Processes that share weights have to compute the same layers at the same time.
        own = passes[setup.accelerator.process_index :: processes] if shared else passes
        sums = torch.zeros(2, dtype=torch.float64, device=setup.device)
        workers = setup.settings.workers
        for batch in load_batches(setup.eval_examples, setup.collator, own, workers):
            output = self._forward(batch)
            count = output.num_trained_tokens
            sums += torch.stack((output.loss.double() * count, count.double()))
        total, count = setup.accelerator.reduce(sums, "sum").tolist()
        if not shared:
            total, count = total / processes, count / processes
        with self._autocast():
            self.on_evaluation(step)
        setup.model.train()
        state = self.state
        state.eval_loss = total / count
        if not math.isfinite(state.eval_loss):
            raise ValueError(f"step {step}: the evaluation's loss is {state.eval_loss}")
        self._add({"step": step, "eval_loss": state.eval_loss, "eval_tokens": int(count)})
        self.progress.say(f"step {step}: evaluation loss {state.eval_loss:.4f}")
        self._window_start += time.perf_counter() - started
        is_best = state.best_loss is None or state.eval_loss < state.best_loss
        if is_best:
            state.best_loss, state.best_step = state.eval_loss, step
        return is_best

    def save(self) -> None:
        """Write a checkpoint of where the run stands, and remove old ones. Every process calls
        this; the first one writes, or each its own part.
        """
        setup, started = self.setup, time.perf_counter()
        states = {
            name: setup.accelerator.gather(state.to(setup.device).unsqueeze(0))
            for name, state in random_state.capture().items()
        }
        self._unreached.share()
        tensors, plain = optimizer_state(setup.optimizer, setup.parameters)
        weights: Mapping[str, torch.Tensor] = setup.parameters
        staged = None
        if setup.settings.checkpoint == "sharded":
            staged = self.checkpoints.stage(self.state.step, weights, tensors)
        else:
            tensors, weights = self._gathered(tensors), self._gathered(weights)
        if setup.accelerator.is_main_process:
            rest = {
                "state": asdict(self.state),
                "optimizer": plain,
                "scaler": setup.scaler.state_dict(),
                "without_gradient": sorted(self._unreached.names),
                "rows": setup.course.rows,
                "processes": setup.accelerator.num_processes,
            }
            if self.log is not None:
                self.log.sync()
            found = Checkpoint(self.state.step, weights, tensors, states, rest)
            self.checkpoints.save(found, staged)
            self.checkpoints.prune(setup.settings.keep, self.state.best_step)
        setup.accelerator.wait_for_everyone()
        self._window_start += time.perf_counter() - started

    def _gathered(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Whole tensors in the first process, on the CPU, gathered one by one; none in others."""
        keeps = self.setup.accelerator.is_main_process
        found = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
        return {name: tensor.cpu() for name, tensor in found if keeps}

    def load(self, step: int) -> None:
        """Continue from a checkpoint.

        Raises:
            ValueError: it is broken, or of a run with other data or processes.
        """
        setup, found = self.setup, self.checkpoints.load(step, self.setup.parameters)
        for name, value in (
            ("rows", setup.course.rows),
            ("processes", setup.accelerator.num_processes),
        ):
            if found.plain[name] != value:
                raise ValueError(
                    f"the run to resume has {found.plain[name]} {name}, this one {value}"
                )
        self.load_weights(step, found)
        plain = found.plain
        load_optimizer_state(setup.optimizer, setup.parameters, found.optimizer, plain["optimizer"])
        setup.scaler.load_state_dict(plain["scaler"])
        self.state = State(**plain["state"])
        self._unreached.names = set(plain["without_gradient"])
        best = self.state.best_step
        if best is not None and best not in self.checkpoints.steps():
            self.state.best_loss = self.state.best_step = None
            self.progress.say(
                f"the best checkpoint, of step {best}, is gone: a later one may be best"
            )
        own = setup.accelerator.process_index
        random_state.restore({name: states[own] for name, states in found.random.items()})

    @torch.no_grad()
    def load_weights(self, step: int, found: Checkpoint | None = None) -> None:
        """Put the trained parameters of a checkpoint into the model."""
        parameters = self.setup.parameters
        weights = (found or self.checkpoints.load(step, parameters)).weights
        if weights.keys() != parameters.keys():
            raise ValueError(
                f"the checkpoint {self.checkpoints.path(step)} has other trained parameters"
            )
        for name, parameter in parameters.items():
            put(parameter, weights[name])


def checkpoints_of(output: Path) -> CheckpointFolder:
    """The checkpoints of the run in a folder."""
    return CheckpointFolder(output / "checkpoints")
