"""The course of a run: how many steps, which rows each trains on, its learning rate, and when it is
evaluated and saved. All of it follows from the settings, the number of rows and the step's number,
so that nothing of it has to be stored.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch

from mllama.train.settings import TrainSettings

_PARTS = 10  # evaluations and checkpoints of a run by default


@dataclass(frozen=True)
class Course:
    """The steps of a run. Steps count from 1.

    Args:
        settings: the run's settings.
        rows: number of training examples.
        processes: number of processes.
        evaluated: whether there is evaluation data.
    """

    settings: TrainSettings
    rows: int
    processes: int = 1
    evaluated: bool = False

    @property
    def per_step(self) -> int:
        """Examples of a step, of all processes."""
        return self.settings.batch_size * self.settings.accumulation * self.processes

    @property
    def steps(self) -> int:
        """Number of optimizer steps. The last one is filled up with rows of the next epoch."""
        if self.settings.max_steps is not None:
            return self.settings.max_steps
        return _whole(self.settings.epochs * self.rows / self.per_step)

    @property
    def steps_per_epoch(self) -> int:
        """Steps until every row was trained on."""
        return math.ceil(self.rows / self.per_step)

    def epoch(self, step: int) -> float:
        """Passes over the data after a step."""
        return step * self.per_step / self.rows

    @property
    def warmup_steps(self) -> int:
        """Steps of rising learning rate."""
        warmup = self.settings.warmup
        return _whole(warmup * self.steps) if warmup < 1 else int(warmup)

    def learning_rate(self, step: int) -> float:
        """It rises linearly to its maximum, then falls to its minimum, which it would have one step
        after the last.
        """
        low, high = self.settings.min_learning_rate, self.settings.learning_rate
        warmup = self.warmup_steps
        if step <= warmup:
            return high * step / warmup
        if self.settings.schedule == "constant":
            return high
        part = (step - 1 - warmup) / (self.steps - warmup)
        if self.settings.schedule == "linear":
            return high + (low - high) * part
        return low + (high - low) * (1 + math.cos(math.pi * part)) / 2

    def is_evaluated(self, step: int) -> bool:
        """Whether the model is evaluated after a step."""
        return self.evaluated and self._is_due(step, self.settings.eval_every)

    def is_saved(self, step: int) -> bool:
        """Whether a checkpoint is written after a step."""
        return self._is_due(step, self.settings.save_every)

    def _is_due(self, step: int, every: int | None) -> bool:
        return step == self.steps or step % (every or math.ceil(self.steps / _PARTS)) == 0

    def batches(self, step: int, process: int = 0) -> list[list[int]]:
        """Indices of the rows of a step, one list for each forward pass of a process.

        Epochs follow one another without a gap; each has an order of its own.
        """
        first = (step - 1) * self.per_step
        places = [divmod(place, self.rows) for place in range(first, first + self.per_step)]
        seed = self.settings.seed
        rows = [int(_order(self.rows, seed, epoch)[place]) for epoch, place in places]
        size = self.settings.batch_size
        passes = [rows[start : start + size] for start in range(0, len(rows), size)]
        return passes[process :: self.processes]


def _whole(steps: float) -> int:
    """Rounded up, but for the error of products: 1.1 * 10 is a little more than 11."""
    return math.ceil(round(steps, 6))


@lru_cache(maxsize=4)
def _order(rows: int, seed: int, epoch: int) -> torch.Tensor:
    """A permutation of the rows, int64 [rows]."""
    generator = torch.Generator().manual_seed((seed << 24) + epoch)
    return torch.randperm(rows, generator=generator)


def held_out(rows: int, fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Indices of the rows to train on and of those to evaluate, both in the data's order.

    Raises:
        ValueError: there are too few rows.
    """
    count = max(1, round(rows * fraction))
    if count >= rows:
        raise ValueError(f"eval_fraction {fraction} of {rows} row(s) leaves none to train on")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(rows, generator=generator).tolist()
    return sorted(order[count:]), sorted(order[:count])
