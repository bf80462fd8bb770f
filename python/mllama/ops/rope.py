"""Rotary position embedding (Su et al., 2021) in the half-split layout: element i is rotated with
element i + D/2.

Three steps: `rope_frequencies` once per model, `rope_tables` once per forward pass, `rope` once per
layer.
"""

import math
import sys

import torch

from mllama.ops._dispatch import (
    check_device,
    check_tensors,
    check_value,
    dtype_name,
    fresh,
    kind,
    register,
    use_kernel,
)
from mllama.ops.recompute import note_of, recomputable

_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8)


def rope(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate queries and keys: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), where x1, x2 are the
    halves of a head.

    Args:
        q: [B, T, H, D], float32, bfloat16 or float16; D even.
        k: [B, T, KV, D], in q's dtype; KV may differ from H.
        cos, sin: float32 [B or 1, T, D/2], from `rope_tables`.

    Returns:
        (rotated q, rotated k), contiguous, with the same shapes and dtype. Computed in float32 and
        rounded once.

    Raises:
        TypeError: an argument is not a tensor of these dtypes.
        ValueError: shapes do not fit each other.
    """
    if torch.is_grad_enabled():
        _check_no_gradient("cos", cos)
        _check_no_gradient("sin", sin)
    if use_kernel("rope", q):
        rotated_q, rotated_k = _rope(q, k, cos, sin, False)
        return _noted(rotated_q, q, cos, sin), _noted(rotated_k, k, cos, sin)
    _check(q, k, cos, sin, False)
    return reference(q, k, cos, sin)


def reference(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """`rope` in plain torch."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)

    def rotate(x: torch.Tensor) -> torch.Tensor:
        x1, x2 = x.float().chunk(2, dim=-1)
        return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), dim=-1).to(x.dtype)

    return rotate(q), rotate(k)


def _noted(
    rotated: torch.Tensor, x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """rotated, noted if x is: a rotation's own backward pass does not save x."""
    note = note_of(x)
    if note is None:
        return rotated

    def rotate(*tensors: torch.Tensor) -> torch.Tensor:
        *inputs, cos, sin = tensors
        again = note.function(*inputs)
        return rope(again, again[:, :, :1], cos, sin)[0]

    return recomputable(rotated, rotate, *note.inputs, cos, sin)


def _check_no_gradient(name: str, table: torch.Tensor) -> None:
    if isinstance(table, torch.Tensor) and table.requires_grad:
        raise ValueError(f"rope: {name} must not require a gradient")


def _check(q, k, cos, sin, inverse) -> None:
    check_tensors("rope", q=q, k=k)
    for name, table in (("cos", cos), ("sin", sin)):
        if not isinstance(table, torch.Tensor) or table.dtype != torch.float32:
            got = getattr(table, "dtype", type(table).__name__)
            raise TypeError(f"rope: {name} must be a float32 torch.Tensor, got {got}")
        check_device("rope", name, table, "q", q)
    for name, x in (("q", q), ("k", k)):
        if x.dim() != 4:
            raise ValueError(f"rope: {name} must be [B, T, heads, D], got {list(x.shape)}")
    batch, length, _, size = q.shape
    if size % 2:
        raise ValueError(f"rope: head size must be even, got {size}")
    if k.shape[:2] != (batch, length) or k.shape[3] != size or k.dtype != q.dtype:
        wanted = f"[{batch}, {length}, heads, {size}] of {dtype_name(q)}"
        raise ValueError(f"rope: k must be {wanted}, got {kind(k)}")
    for name, table in (("cos", cos), ("sin", sin)):
        if table.shape[1:] != (length, size // 2) or table.shape[0] not in (1, batch):
            raise ValueError(
                f"rope: {name} must be [{batch} or 1, {length}, {size // 2}], "
                f"got {list(table.shape)}"
            )


def _setup(ctx, inputs, output):
    _, _, cos, sin, ctx.inverse = inputs
    ctx.save_for_backward(cos, sin)


def _derivative(ctx, grad_q, grad_k):
    """The gradient of a rotation is the inverse rotation. It is linear, so higher derivatives are
    correct too.
    """
    return *_rope(grad_q, grad_k, *ctx.saved_tensors, not ctx.inverse), None, None, None


def _fake(q, k, cos, sin, inverse):
    return fresh(q), fresh(k)


_rope = register("rope", check=_check, fake=_fake, backward=_derivative, setup_context=_setup)


def rope_tables(
    position_ids: torch.Tensor, frequencies: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines of position * frequency.

    Args:
        position_ids: integer [B, T].
        frequencies: float32 [D/2], from `rope_frequencies`.

    Returns:
        (cos, sin), float32 [B, T, D/2] each.

    Raises:
        TypeError: positions are not an integer tensor, or frequencies not a float32 tensor.
        ValueError: positions are not [B, T], or frequencies not [D/2] on the same device.
    """
    if not isinstance(position_ids, torch.Tensor) or position_ids.dtype not in _INTEGERS:
        got = getattr(position_ids, "dtype", type(position_ids).__name__)
        raise TypeError(f"rope_tables: position_ids must be an integer torch.Tensor, got {got}")
    if not isinstance(frequencies, torch.Tensor) or frequencies.dtype != torch.float32:
        got = getattr(frequencies, "dtype", type(frequencies).__name__)
        raise TypeError(f"rope_tables: frequencies must be a float32 torch.Tensor, got {got}")
    check_value(
        position_ids.dim() == 2,
        f"rope_tables: position_ids must be [B, T], got {list(position_ids.shape)}",
    )
    check_value(
        frequencies.dim() == 1,
        f"rope_tables: frequencies must be [D/2], got {list(frequencies.shape)}",
    )
    check_device("rope_tables", "frequencies", frequencies, "position_ids", position_ids)
    angles = position_ids.unsqueeze(-1).float() * frequencies
    return angles.cos(), angles.sin()


def rope_frequencies(
    head_dim: int,
    theta: float = 10000.0,
    scaling: dict | None = None,
    device: torch.device | str | None = None,
) -> torch.Tensor:
    """Rotary frequencies: the angle per position of each pair, theta^(-2i / head_dim), scaled.

    Args:
        head_dim: size of a head, even.
        theta: base of the frequencies.
        scaling: a Hugging Face `rope_scaling` or `rope_parameters` dict, or None. Its type
            (`rope_type` or the older `type`) is default; linear (`factor` divides every angle); or
            llama3 (`factor`, `low_freq_factor`, `high_freq_factor`,
            `original_max_position_embeddings`: long waves are divided by the factor, short ones
            unchanged, those between interpolated). Its `rope_theta` overrides the argument.
        device: device of the result.

    Returns:
        float32 [head_dim / 2].

    Raises:
        TypeError: scaling is not a dict, or head_dim not an int.
        ValueError: the type is unknown, or a number is missing or invalid.
    """
    if not isinstance(head_dim, int):
        raise TypeError(f"rope_frequencies: head_dim must be an int, got {type(head_dim).__name__}")
    check_value(
        head_dim > 0 and head_dim % 2 == 0,
        f"rope_frequencies: head_dim must be even and positive, got {head_dim}",
    )
    if scaling is None:
        scaling = {}
    if not isinstance(scaling, dict):
        raise TypeError(
            f"rope_frequencies: scaling must be a dict or None, got {type(scaling).__name__}"
        )
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if not isinstance(kind, str) or kind not in _SCALINGS:
        raise ValueError(
            f"rope_frequencies: unknown rope type {kind!r}; known are {', '.join(_SCALINGS)}"
        )
    check_value(
        scaling.get("partial_rotary_factor") in (None, 1.0),
        "rope_frequencies: only partial_rotary_factor 1 is supported",
    )
    theta = scaling.get("rope_theta", theta)
    _check_positive("theta", theta)
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim
    return _SCALINGS[kind](1.0 / float(theta) ** exponents, scaling)


def _default(frequencies: torch.Tensor, scaling: dict) -> torch.Tensor:
    return frequencies


def _linear(frequencies: torch.Tensor, scaling: dict) -> torch.Tensor:
    return frequencies / _number(scaling, "factor")


def _llama3(frequencies: torch.Tensor, scaling: dict) -> torch.Tensor:
    factor, low, high, length = (
        _number(scaling, name)
        for name in (
            "factor",
            "low_freq_factor",
            "high_freq_factor",
            "original_max_position_embeddings",
        )
    )
    check_value(
        high > low,
        f"rope_frequencies: high_freq_factor must exceed low_freq_factor, got {high} and {low}",
    )
    waves = 2 * math.pi / frequencies
    keep = ((length / waves - low) / (high - low)).clamp(0, 1)  # 1 for short waves, 0 for long
    return keep * frequencies + (1 - keep) * frequencies / factor


_SCALINGS = {"default": _default, "linear": _linear, "llama3": _llama3}


def _number(scaling: dict, name: str) -> float:
    if name not in scaling:
        raise ValueError(
            f"rope_frequencies: scaling of this type needs {name!r}; "
            f"it has {', '.join(map(str, scaling))}"
        )
    _check_positive(name, scaling[name])
    return float(scaling[name])


def _check_positive(name: str, value: float) -> None:
    valid = (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and 0 < value <= sys.float_info.max
    )
    check_value(valid, f"rope_frequencies: {name} must be a positive number, got {value!r}")
