"""Prepares batches, in this process or in workers."""

import os
import signal
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader

from mllama.data.rows import Example
from mllama.hf.processors.chat import IGNORED

Batch = Mapping[str, torch.Tensor]


class _Maker:
    """Makes the batch of some rows. A worker returns its error as a text: raised there, it would
    come as a page of traceback.
    """

    def __init__(
        self, examples: Sequence[Example], collate: Callable[[list[Example]], Batch], raises: bool
    ):
        self.examples, self.collate, self.raises = examples, collate, raises

    def __call__(self, indices: Sequence[int]) -> Batch | str:
        try:
            return self.collate([self.examples[index] for index in indices])
        except (ValueError, OSError) as error:
            if self.raises:
                raise
            return str(error)


def load_batches(
    examples: Sequence[Example],
    collate: Callable[[list[Example]], Batch],
    indices: Iterable[list[int]],
    workers: int,
) -> Iterator[Batch]:
    """The batch of each list of indices, in order. No global random number is drawn.

    Args:
        examples: rows of data.
        collate: makes a batch.
        indices: of the rows of each batch.
        workers: number of processes that prepare batches; 0: none.

    Raises:
        ValueError, OSError: as `examples` and `collate`. An error of a worker is a ValueError.
    """
    maker = _Maker(examples, collate, raises=not workers)
    if not workers:
        yield from map(maker, indices)  # type: ignore[misc]
        return
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # threads do not survive a fork
    loader: Any = DataLoader(
        range(len(examples)),  # type: ignore[arg-type]
        batch_sampler=indices,
        collate_fn=maker,
        num_workers=workers,
        worker_init_fn=_leave_signals,
        generator=torch.Generator(),
    )
    for batch in loader:
        if isinstance(batch, str):
            raise ValueError(batch)
        yield batch


def _leave_signals(worker: int) -> None:
    """Ctrl-C is for the training process, which ends its workers by SIGTERM."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def count_trained(batch: Batch) -> int:
    """The number of labels that a batch trains: each row's first has nothing before it."""
    return int((batch["labels"][:, 1:] != IGNORED).sum())


def count_tokens(batch: Batch) -> int:
    """The number of tokens in a batch, without padding."""
    mask = batch.get("attention_mask")
    return batch["input_ids"].numel() if mask is None else int(mask.sum())
