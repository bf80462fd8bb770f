"""Cross entropy of rows of logits, with its gradient in their place: what losses in chunks are made
of.
"""

import torch

from mllama import _ext
from mllama.ops._dispatch import check_device, check_dtype, check_tensors, use_kernel


def cross_entropy_(
    scores: torch.Tensor, targets: torch.Tensor, softcap: float = 0.0, gradient: float = 0.0
) -> torch.Tensor:
    """The losses of rows of logits, computed in float32. Not differentiable: a loss calls it and
    has the gradient.

    Args:
        scores: contiguous [N, vocabulary], float32, bfloat16 or float16. Where `gradient` is not 0,
            it becomes that many times the gradient of each row's loss.
        targets: int64 [N]; rows whose target is not of the vocabulary have loss and gradient 0.
        softcap: logits are softcap * tanh(scores / softcap); 0: the scores.
        gradient: see scores.
    Returns:
        float32 [N].

    Raises:
        TypeError, ValueError: of other dtypes or shapes, or on several devices.
    """
    _check(scores, targets)
    if use_kernel("cross_entropy", scores):
        return torch.ops.mllama._cross_entropy.kernel(scores, targets, softcap, gradient)
    return reference(scores, targets, softcap, gradient)


def reference(
    scores: torch.Tensor, targets: torch.Tensor, softcap: float = 0.0, gradient: float = 0.0
) -> torch.Tensor:
    """`cross_entropy_` in plain torch."""
    t = torch.tanh(scores.float() / softcap) if softcap else None
    logits = scores.float() if t is None else softcap * t
    counts = (targets >= 0) & (targets < scores.shape[1])
    own = targets.masked_fill(~counts, 0)[:, None]
    logs = logits.log_softmax(-1)
    if gradient:
        slopes = logs.exp().scatter_add(1, own, own.new_full(own.shape, -1, dtype=torch.float32))
        slopes = slopes if t is None else slopes * (1 - t * t)
        scores.copy_((gradient * slopes).masked_fill(~counts[:, None], 0))
    return -logs.gather(1, own)[:, 0].masked_fill(~counts, 0)


def _check(scores: torch.Tensor, targets: torch.Tensor) -> None:
    op = "cross_entropy_"
    check_tensors(op, scores=scores)
    check_dtype(op, "targets", targets, torch.int64)
    check_device(op, "targets", targets, "scores", scores)
    if scores.dim() != 2 or not scores.shape[1] or not scores.is_contiguous():
        raise ValueError(
            f"{op}: scores must be contiguous [rows, vocabulary], got {list(scores.shape)} with "
            f"strides {scores.stride()}"
        )
    if targets.shape != scores.shape[:1] or not targets.is_contiguous():
        raise ValueError(
            f"{op}: targets must be contiguous [{len(scores)}], got {list(targets.shape)}"
        )


def _fake(
    scores: torch.Tensor, targets: torch.Tensor, softcap: float, gradient: float
) -> torch.Tensor:
    _check(scores, targets)
    return scores.new_empty(targets.shape, dtype=torch.float32)


if _ext.load() is not None:
    for _name in ("mllama::_cross_entropy", "mllama::_cross_entropy.kernel"):
        torch.library.register_fake(_name, _fake)
