"""Four-bit codes of a weight for the inputs that it gets, after Frantar et al., "GPTQ: Accurate
Post-Training Quantization for Generative Pre-trained Transformers", 2022 (arXiv:2210.17323).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from mllama.ops.packed_codes import NESTED, nested_steps
from mllama.ops.packed_layout import GROUP, LANES, join, split
from mllama.ops.packed_linear import pack_weight, unpack_weight

# Added to the Hessian's diagonal, of each element itself. The paper's hundredth of their mean is
# more than most of them where a few inputs are far larger than all others, and undoes the method.
# The later ones are for matrices that float32 does not hold well enough.
_DAMPING = 0.01, 0.1, 1.0
FORMAT = "int4"


def pack_int4(weight: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """`pack_weight(weight, "int4")` with less error in the layer's output. One input's weights
    after the other are rounded; those that are left make up for the error, as far as their inputs
    go together with it. A group's scale and minimum are fitted when its turn comes, by squared
    errors times the size of the inputs.

    Args:
        weight: [out, in], float32, bfloat16 or float16.
        hessian: x'x of the layer's inputs x [n, in], float32 [in, in].

    Returns:
        uint8, as `pack_weight` returns it.

    Raises:
        ValueError: as `pack_weight`; the hessian is not finite, or no such product.
    """
    rows, columns = weight.shape
    if hessian.shape != (columns, columns) or not hessian.isfinite().all():
        raise ValueError(f"hessian must be finite, [{columns}, {columns}]")
    packed = pack_weight(weight, FORMAT)
    if not weight.numel():
        return packed
    header, _, _ = split(packed, rows, columns, FORMAT)  # of the rows: kept
    steps = [x.flatten().float() for x in header]
    w = nn.functional.pad(weight.float(), (0, -columns % GROUP, 0, -rows % LANES))
    factor = _inverse_factor(hessian, w.shape[1])
    importance = nn.functional.pad(hessian.diagonal(), (0, w.shape[1] - columns))
    parts = [
        _round_group(w, factor, importance, start, *steps) for start in range(0, w.shape[1], GROUP)
    ]
    # (rows, groups, 1), the same, (rows, groups, GROUP)
    s, m, codes = (torch.stack(x, 1).unflatten(0, (-1, LANES)) for x in zip(*parts, strict=True))
    scales = [x[..., 0].to(torch.uint8) for x in (s, m)]
    return join(header, scales, codes, FORMAT)


def _inverse_factor(hessian: torch.Tensor, size: int) -> torch.Tensor:
    """The upper Cholesky factor of the inverse, padded to `size` inputs that are always zero."""
    added = size - hessian.shape[0]
    for damping in _DAMPING:
        h = nn.functional.pad(hessian, (0, added, 0, added))
        diagonal = h.diagonal()
        diagonal[diagonal == 0] = 1  # inputs that are always zero
        diagonal *= 1 + damping
        lower, failed = torch.linalg.cholesky_ex(h)
        if not failed:
            upper, failed = torch.linalg.cholesky_ex(torch.cholesky_inverse(lower), upper=True)
            if not failed:
                return upper
    raise ValueError("hessian must be x'x of some inputs x")


def _round_group(
    w: torch.Tensor,
    factor: torch.Tensor,
    importance: torch.Tensor,
    start: int,
    d: torch.Tensor,
    e: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Round the GROUP inputs from `start` on, and let the later ones in w [rows, inputs] make up
    for the error. Returns s and m [rows, 1] and codes [rows, GROUP].
    """
    end = start + GROUP
    group, inner = w[:, start:end], factor[start:end, start:end]
    s, m = nested_steps(group, d, e, NESTED[FORMAT], 15, importance[start:end])
    step, shift = s * d, m * e
    inverse = torch.where(step > 0, 1 / step, 0)
    codes, errors = torch.empty_like(group), torch.empty_like(group)
    for k in range(GROUP):
        codes[:, k] = torch.round((group[:, k] + shift) * inverse).clamp(0, 15)
        errors[:, k] = (group[:, k] - (codes[:, k] * step - shift)) / inner[k, k]
        group[:, k + 1 :] -= torch.outer(errors[:, k], inner[k, k + 1 :])
    w[:, end:] -= errors @ factor[start:end, end:]
    return s[:, None], m[:, None], codes


Put = Callable[[str, torch.Tensor, str, torch.dtype], None]  # `Packer.put`


@torch.no_grad()
def pack_calibrated(model: nn.Module, names: Iterable[str], ids: torch.Tensor, put: Put) -> None:
    """Pack linear layers in the order in which a text goes through them, each for the inputs that
    the layers packed before it give. Layers that it does not go through stay as they are.

    Args:
        model: with a decoder `language_model`.
        names: the layers'.
        ids: int64 [rows, T], the text.
        put: called with a layer's name, packed weight, format and dtype; it replaces the layer.
    """
    chosen = {model.get_submodule(name): name for name in names}
    with _on_input(chosen, put):
        model.get_submodule("language_model")(input_ids=ids)


@contextmanager
def _on_input(chosen: dict[nn.Module, str], put: Put) -> Iterator[None]:
    """Context in which each of the layers is packed when it is called."""
    latest: list[torch.Tensor] = []  # an input and its hessian: q, k and v have the same

    def pack(module: Any, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0]
        if not latest or latest[0] is not x:
            # Every token counts the same: the first ones of a text can be a thousand times larger
            # than all others, and would be all that the codes are chosen for.
            rows = nn.functional.normalize(x.flatten(0, -2).float(), dim=-1)
            latest[:] = x, rows.T @ rows
        weight = module.weight.detach()
        packed = pack_int4(weight, latest[1])
        put(chosen[module], packed, FORMAT, weight.dtype)
        # This call still runs in the dense layer.
        dense = unpack_weight(packed, *weight.shape, FORMAT, dtype=weight.dtype)
        module.weight = nn.Parameter(dense, requires_grad=False)

    def release(module: Any, arguments: tuple, output: torch.Tensor) -> None:
        module.weight = None

    handles = [module.register_forward_pre_hook(pack) for module in chosen]
    handles += [module.register_forward_hook(release) for module in chosen]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
