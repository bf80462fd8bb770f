"""The next token of each row: the likeliest one, or a drawn one, with the same processing of
logits, in the same order, as in transformers.
"""

import math
from typing import Any

import torch

from mllama.ops._dispatch import (
    check_device,
    check_dtype,
    check_tensors,
    kind,
    register,
    use_kernel,
)


def select_token(
    logits: torch.Tensor,
    uniform: torch.Tensor | None = None,
    present: torch.Tensor | None = None,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    non_blocking: bool = False,
) -> torch.Tensor:
    """Select a token per row.

    Args:
        logits: [B, V], float32, bfloat16 or float16.
        uniform: float64 [B], random numbers in [0, 1). A row's token is the first one up to which
            the probabilities add up to more than this. None takes the likeliest token.
        present: bool [B, V], tokens that occurred, whose logits `repetition_penalty` lowers.
        temperature, top_k, top_p, min_p: what is drawn from, see `runtime.sampler.Sampling`; read
            with `uniform` only.
        repetition_penalty: divides positive and multiplies negative logits of present tokens.
        non_blocking: do not wait for a device. There, a row that is an error otherwise gets -1.

    Returns:
        int64 [B].

    Raises:
        TypeError: a tensor has the wrong dtype.
        ValueError: shapes do not fit, a number is out of range, or with `uniform`, a row's largest
            logit is not finite.
    """
    numbers = (temperature, top_k, top_p, min_p, repetition_penalty)
    _check_numbers(*numbers)
    arguments = (logits, uniform, present, *numbers)
    if use_kernel("select_token", logits):
        try:
            tokens = _select_token(*arguments)
        except ValueError:
            if logits.is_cpu:
                _check_distribution(logits, uniform)
            raise
    else:
        _check(*arguments)
        if logits.is_cpu:
            _check_distribution(logits, uniform)
        tokens = _select_by_reference(*arguments)
    if uniform is not None and not (logits.is_cpu or non_blocking) and (tokens < 0).any():
        _check_distribution(logits, uniform)
    return tokens


def _select_by_reference(logits, uniform, present, *numbers) -> torch.Tensor:
    """What kernels return on a device."""
    names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    options = dict(zip(names, numbers, strict=True))
    tokens = reference(logits, uniform, present, **options)
    if uniform is None:
        return tokens
    return tokens.where(logits.float().amax(-1).isfinite(), -1)


def reference(
    logits: torch.Tensor,
    uniform: torch.Tensor | None = None,
    present: torch.Tensor | None = None,
    *,
    repetition_penalty: float = 1.0,
    **options: Any,
) -> torch.Tensor:
    """`select_token` in plain torch."""
    scores = penalize(logits.float(), present, repetition_penalty)
    if uniform is None:
        return scores.argmax(-1)
    return draw(process(scores, **options).softmax(-1), uniform)


def penalize(
    scores: torch.Tensor, present: torch.Tensor | None, repetition_penalty: float
) -> torch.Tensor:
    """[B, V] -> [B, V], the scores of present tokens lowered."""
    if present is None or repetition_penalty == 1:
        return scores
    lowered = torch.where(scores < 0, scores * repetition_penalty, scores / repetition_penalty)
    return torch.where(present, lowered, scores)


def process(
    scores: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
) -> torch.Tensor:
    """float32 [B, V] -> [B, V]: scores whose softmax is drawn from; -inf for excluded tokens."""
    if temperature != 1:
        scores = scores / temperature
    if top_k:
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]  # (B, 1)
        scores = scores.masked_fill(scores < least, -math.inf)
    if top_p < 1:
        scores = _top_p(scores, top_p)
    if min_p > 0:
        probabilities = scores.softmax(-1)
        least = min_p * probabilities.amax(-1, keepdim=True)  # (B, 1)
        scores = scores.masked_fill(probabilities < least, -math.inf)
    return scores


def draw(probabilities: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Each row's first token up to which probabilities add up to more than `uniform` of all."""
    sums = probabilities.double().cumsum(-1)
    tokens = (sums <= (uniform * sums[:, -1])[:, None]).sum(-1)
    last = probabilities.shape[-1] - 1 - (probabilities > 0).flip(-1).int().argmax(-1)
    return tokens.minimum(last)  # where the product was rounded up to the last sum


def _top_p(scores: torch.Tensor, top_p: float) -> torch.Tensor:
    """Exclude the unlikeliest tokens that add up to 1 - top_p or less; at least one stays."""
    ordered, order = scores.sort(dim=-1, stable=True)
    dropped = ordered.softmax(-1).cumsum(-1) <= 1 - top_p
    dropped[:, -1] = False
    return scores.masked_fill(dropped.scatter(1, order, dropped), -math.inf)


def _check_numbers(temperature, top_k, top_p, min_p, repetition_penalty) -> None:
    wanted = {
        "temperature": (temperature, 0 < temperature < math.inf, "above 0 and finite"),
        "top_k": (top_k, isinstance(top_k, int) and 0 <= top_k < 2**63, "an int of at least 0"),
        "top_p": (top_p, 0 <= top_p <= 1, "0 to 1"),
        "min_p": (min_p, 0 <= min_p <= 1, "0 to 1"),
        "repetition_penalty": (
            repetition_penalty,
            0 < repetition_penalty < math.inf,
            "above 0 and finite",
        ),
    }
    for name, (value, fits, what) in wanted.items():
        if not fits:
            raise ValueError(f"select_token: {name} must be {what}, got {value}")


def _check(logits, uniform, present, *numbers) -> None:
    check_tensors("select_token", logits=logits)
    if logits.dim() != 2 or not 0 < logits.shape[1] < 2**31:
        raise ValueError(
            f"select_token: logits must be [batch, vocabulary], got {list(logits.shape)}"
        )
    for name, value, dtype, shape in (
        ("uniform", uniform, torch.float64, logits.shape[:1]),
        ("present", present, torch.bool, logits.shape),
    ):
        if value is None:
            continue
        check_dtype("select_token", name, value, dtype)
        if value.shape != shape:
            raise ValueError(f"select_token: {name} must be {list(shape)}, got {kind(value)}")
        check_device("select_token", name, value, "logits", logits)


def _check_distribution(logits, uniform) -> None:
    """With a temperature and penalties that are finite, the logits say whether the scores are."""
    if uniform is not None and not (finite := logits.float().amax(-1).isfinite()).all():
        row = int((~finite).nonzero()[0])
        raise ValueError(
            f"select_token: logits must have a finite maximum in each row to draw from, got "
            f"{logits[row].float().max().item()} in row {row}"
        )


def _fake(logits, uniform, present, *numbers):
    return logits.new_empty(logits.shape[0], dtype=torch.int64)


_select_token = register("select_token", check=_check, fake=_fake, why="tokens are integers")
