"""Checks of a model and a batch before a run: gradients, frozen parameters, labels, and whether it
learns. Each leaves the model as it was.
"""

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mllama.data.collate import Collator
from mllama.hf.processors.chat import IGNORED
from mllama.lora.layer import lora_layers
from mllama.lora.scopes import is_read
from mllama.nn.wrappers import plain_name, unwrapped
from mllama.train.batches import Batch
from mllama.train.prepare import autocast, compute_dtype, prepare_model
from mllama.train.rows import open_rows
from mllama.train.settings import TrainSettings

_SHOWN = 5  # names in a message
_FALL = 0.9  # of the first loss, that a repeated batch must fall below


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        name: the function's.
        passed: whether all is well.
        message: one line: what was found, or what is wrong.
    """

    name: str
    passed: bool
    message: str

    def __str__(self) -> str:
        return f"{'ok  ' if self.passed else 'FAIL'} {self.name}: {self.message}"


def check_gradients(model: nn.Module, batch: Batch) -> Check:
    """Whether every trained parameter gets a finite gradient from the batch.

    An adapter's A has a gradient of zeros until its B is trained; that counts, unless A is zeros,
    too: neither gets another gradient ever. A parameter without any, such as the image encoder's
    for a batch without images, does not. Parts of an encoder that the model does not compute, after
    the layer whose features it reads, are not asked for.
    """
    trained = _trained(model)
    if not trained:
        return Check("check_gradients", False, "nothing is trained: no parameter requires_grad")
    with _as_it_was(model):
        _loss(model, batch).backward()
        missing = [
            name
            for name, one in trained.items()
            if one.grad is None and is_read(model, plain_name(model, name))
        ]
        broken = [
            name
            for name, one in trained.items()
            if one.grad is not None and not bool(one.grad.isfinite().all())
        ]
        reached = sum(one.grad is not None for one in trained.values())
        moving = sum(one.grad is not None and bool(one.grad.any()) for one in trained.values())
    if missing:
        return Check("check_gradients", False, f"no gradient reaches {_listed(missing)}")
    if broken:
        return Check("check_gradients", False, f"the gradient is not finite of {_listed(broken)}")
    if not moving:
        return Check("check_gradients", False, "all gradients are zero")
    if dead := _dead_adapters(model):
        return Check("check_gradients", False, f"A and B are both zeros in {_listed(dead)}")
    return Check(
        "check_gradients",
        True,
        f"{reached} trained parameters have gradients, {moving} of them not zero",
    )


def check_frozen(model: nn.Module, batch: Batch, learning_rate: float = 1e-2) -> Check:
    """Whether an optimizer step leaves every frozen parameter and buffer as it was, to the bit, and
    changes a trained one. Frozen tensors are compared by SHA-256, not copied.
    """
    trained = _trained(model)
    if not trained:
        return Check("check_frozen", False, "nothing is trained: no parameter requires_grad")
    with _as_it_was(model):
        before = {name: _digest(one) for name, one in _tensors(model)}
        # With decay: a parameter that is frozen by a gradient of zeros alone would change.
        optimizer = torch.optim.AdamW(trained.values(), learning_rate, weight_decay=0.1)
        _loss(model, batch).backward()
        optimizer.step()
        now = {name: _digest(one) for name, one in _tensors(model)}
        changed = {name for name in before if before[name] != now[name]}
    if wrong := sorted(changed - trained.keys()):
        return Check("check_frozen", False, f"a step changes {_listed(wrong)}")
    if not changed:
        return Check("check_frozen", False, "a step changes nothing")
    return Check(
        "check_frozen",
        True,
        f"{len(before) - len(trained)} frozen tensors keep their bits, {len(changed)} trained ones "
        "change",
    )


def check_labels(model: nn.Module, batch: Batch) -> Check:
    """Whether labels are sane: equal to the ids they stand at, within the vocabulary, on no
    placeholder, no padding and no first token of a packed example, in every row, and not on all
    tokens of a row's text.
    """
    problem, found = _label_problem(unwrapped(model), batch)
    return Check("check_labels", problem is None, problem or found)


def check_overfit(
    model: nn.Module, batch: Batch, steps: int = 20, learning_rate: float = 1e-3
) -> Check:
    """Whether the loss of one batch falls by a tenth when the model is trained on it alone. All
    trained parameters are put back.

    Args:
        model: the model, as it would be trained.
        batch: as a `Collator` returns it.
        steps: of AdamW.
        learning_rate: of all steps.
    """
    trained = _trained(model)
    if not trained:
        return Check("check_overfit", False, "nothing is trained: no parameter requires_grad")
    with _as_it_was(model):
        optimizer = torch.optim.AdamW(trained.values(), learning_rate, weight_decay=0.0)
        losses = []
        for _ in range(steps):
            loss = _loss(model, batch)
            losses.append(loss.item())
            if not math.isfinite(losses[-1]):
                break
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        else:
            with torch.no_grad():
                losses.append(_loss(model, batch).item())
    what = f"the loss of one batch goes from {losses[0]:.4f} to {losses[-1]:.4f}"
    passed = math.isfinite(losses[-1]) and losses[-1] < _FALL * losses[0]
    return Check("check_overfit", passed, f"{what} in {len(losses) - 1} steps")


def run_checks(settings: TrainSettings, rows: int | None = None) -> list[Check]:
    """All checks for a run: its model, adapted, and a batch of its first rows.

    Args:
        settings: the run's.
        rows: of the batch. Default: the run's batch_size.

    Raises:
        TypeError, ValueError, FileNotFoundError: model, data or settings do not fit each other.
    """
    model, processor, _ = prepare_model(settings, quiet=True)
    collator = Collator(model, processor, settings.max_length, settings.pack)
    count = rows or settings.batch_size
    batch = collator(open_rows(settings, collator, most=count)[:count])
    device, dtype = next(model.parameters()).device, compute_dtype(settings, model)
    batch = {name: value.to(device) for name, value in batch.items()}
    with autocast(device.type, dtype):
        return [
            check_labels(model, batch),
            check_gradients(model, batch),
            check_frozen(model, batch),
            check_overfit(model, batch),
        ]


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: one for name, one in model.named_parameters() if one.requires_grad}


def _dead_adapters(model: nn.Module) -> list[str]:
    """Trained layers that stay as they are: the gradient of either matrix is a product with the
    other one.
    """
    return [
        name
        for name, layer in lora_layers(model).items()
        if any(one.weight.requires_grad for one in (layer.lora_a, layer.lora_b))
        and not bool(layer.lora_a.weight.any())
        and not bool(layer.lora_b.weight.any())
    ]


def _tensors(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    yield from model.named_parameters()
    yield from model.named_buffers()


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    return model(**batch, logits_to_keep=None, use_cache=False).loss


def _digest(tensor: torch.Tensor) -> bytes:
    """Of a tensor's bits."""
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8)
    return hashlib.sha256(data.numpy()).digest()  # type: ignore[arg-type]


@contextmanager
def _as_it_was(model: nn.Module) -> Iterator[None]:
    """Context in training mode, with gradients and without earlier ones. At its end trained
    parameters, gradients, modes and random numbers are what they were.
    """
    modes = {module: module.training for module in model.modules()}
    values = {name: one.detach().clone() for name, one in _trained(model).items()}
    grads = {name: one.grad for name, one in model.named_parameters()}
    for one in model.parameters():
        one.grad = None
    devices = [one for one in {p.device for p in model.parameters()} if one.type == "cuda"]
    try:
        with torch.enable_grad(), torch.random.fork_rng(devices):
            model.train()
            yield
    finally:
        with torch.no_grad():
            for name, one in _trained(model).items():
                one.copy_(values[name])
        for name, one in model.named_parameters():
            one.grad = grads[name]
        for module, mode in modes.items():
            module.training = mode


def _label_problem(model: Any, batch: Batch) -> tuple[str | None, str]:
    """What is wrong with a batch's labels, or None; and what they are."""
    ids, labels = batch["input_ids"], batch["labels"]
    if labels.shape != ids.shape:
        return f"labels are {list(labels.shape)}, input_ids {list(ids.shape)}", ""
    trained = labels != IGNORED
    vocabulary, mask = model.spec.text.vocab_size, batch.get("attention_mask")
    real = torch.ones_like(trained) if mask is None else mask != 0
    placeholders = _placeholders(model, batch)
    rules = {
        "labels outside of the vocabulary": trained & ((labels < 0) | (labels >= vocabulary)),
        "labels that are not the ids they stand at": trained & (labels != ids),
        "labels on padding": trained & ~real,
        "labels on image placeholders": trained & placeholders,
        "labels on first tokens of packed examples": trained & _first_tokens(batch),
    }
    for what, wrong in rules.items():
        if bool(wrong.any()):
            row, place = wrong.nonzero()[0].tolist()
            return f"{int(wrong.sum())} {what}, the first in row {row}, token {place}", ""
    shares = (trained[:, 1:].sum(1) / real.sum(1)).tolist()
    if 0.0 in shares:
        return f"row {shares.index(0.0)} has nothing to train on", ""
    text = real & ~placeholders
    if bool((whole := (trained | ~text)[:, 1:].all(1)).any()):
        row = whole.nonzero()[0].item()
        return f"every token of row {row} is trained, the prompts too", ""
    return None, _shares(shares, int(trained[:, 1:].sum()))


def _shares(shares: Sequence[float], count: int) -> str:
    return (
        f"{count} tokens of {len(shares)} rows are trained, {min(shares):.0%} to "
        f"{max(shares):.0%} of a row"
    )


def _placeholders(model: Any, batch: Batch) -> torch.Tensor:
    token = model.spec.image_token_index
    ids = batch["input_ids"]
    return torch.zeros_like(ids, dtype=torch.bool) if token is None else ids == token


def _first_tokens(batch: Batch) -> torch.Tensor:
    """Of the examples of packed rows but the first: the token before is another example's."""
    places = batch.get("position_ids") if batch.get("attention_mask") is None else None
    found = torch.zeros_like(batch["input_ids"], dtype=torch.bool)
    if places is not None:
        found[:, 1:] = places[:, 1:] == 0
    return found


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
