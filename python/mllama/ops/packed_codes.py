"""Quantizers of packed weights in plain torch: the numbers that a format stores for a weight. The
kernels (csrc/kernels/cpu/pack_weight.cpp) are tested against them.
"""

from collections.abc import Callable

import torch

BITS = {
    "int8": 8,
    "int4": 4,
    "q4_0": 4,
    "q4_1": 4,
    "q5_0": 5,
    "q5_1": 5,
    "q4_k": 4,
    "q5_k": 5,
    "q6_k": 6,
}
CENTERED = ("q4_0", "q5_0")  # scale * (code - center)
SHIFTED = ("q4_1", "q5_1")  # scale * code + minimum
NESTED = {"int4": 255, "q4_k": 63, "q5_k": 63}  # d * s * code - e * m, with s and m up to these
Numbers = tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]  # header, scales, codes


def quantize(w: torch.Tensor, packing: str, span: int) -> Numbers:
    """Numbers of a weight.

    Args:
        w: float32 (blocks, lanes, groups, inputs of a group).
        packing: one of BITS.
        span: groups that share a header.

    Returns:
        The header's numbers (blocks, lanes, headers) and the groups' (blocks, lanes, groups), as
        they are stored, and codes of w's shape.
    """
    if packing == "int8":
        scale = half_scale(w.abs().amax(3) / 127)
        return [], [scale], torch.round(w * _inverse(scale)[..., None]).clamp(-127, 127)
    if packing in CENTERED:
        return _quantize_centered(w, BITS[packing])
    if packing in SHIFTED:
        return _quantize_shifted(w, BITS[packing])
    if packing in NESTED:
        return _quantize_nested(w, BITS[packing], NESTED[packing], span)
    return _quantize_q6_k(w, span)


def _quantize_centered(w: torch.Tensor, bits: int) -> Numbers:
    center = 2 ** (bits - 1)
    scale = half_scale(fit_centered(w, center))
    codes = torch.round(w * _inverse(scale)[..., None] + center)
    return [], [scale], codes.clamp(0, 2 * center - 1)


def _quantize_shifted(w: torch.Tensor, bits: int) -> Numbers:
    highest, low = 2**bits - 1, w.amin(3)
    scale, low = half_scale((w.amax(3) - low) / highest), low.half()
    codes = torch.round((w - low.float()[..., None]) * _inverse(scale)[..., None])
    return [], [scale, low], codes.clamp(0, highest)


def _quantize_nested(w: torch.Tensor, bits: int, steps: int, span: int) -> Numbers:
    """Scales and minima of the groups as multiples, up to `steps`, of those in the header."""
    highest, groups = 2**bits - 1, w.shape[2]
    fit = fit_affine(w, highest)
    header = [half_above(_by_span(x, span).amax(3) / steps) for x in (fit[0], -fit[1])]
    of_group = torch.arange(groups, device=w.device) // span
    d, e = (value.float()[:, :, of_group] for value in header)
    s, m = nested_steps(w, d, e, steps, highest, fit=fit)
    codes = torch.round((w + (e * m)[..., None]) * _inverse(d * s)[..., None]).clamp(0, highest)
    return header, [s.to(torch.uint8), m.to(torch.uint8)], codes


def nested_steps(
    w: torch.Tensor,
    d: torch.Tensor,
    e: torch.Tensor,
    steps: int,
    highest: int,
    importance: torch.Tensor | float = 1.0,
    fit: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Multiples s and m, 0 to `steps`, of d and e [...], for groups w [..., inputs] and their fit
    (default: `fit_affine`).
    """
    scale, minimum = fit_affine(w, highest, importance) if fit is None else fit
    m = torch.round(-minimum * _inverse(e)).clamp(0, steps)

    def error(s: torch.Tensor) -> torch.Tensor:
        return _squared_error(w, d * s, -e * m, highest, importance)

    return _steps(scale * _inverse(d), 0, steps, error), m


def _quantize_q6_k(w: torch.Tensor, span: int) -> Numbers:
    """Scales of 16 inputs as multiples, -128 to 127, of the one in the header."""
    halves = w.unflatten(3, (2, -1))
    fits = fit_centered(halves, 32)  # (blocks, lanes, groups, 2)
    header = half_above(_extreme(_by_span(fits, span).flatten(3)) / -128 + 0.0)
    d = header.float()[:, :, torch.arange(w.shape[2], device=w.device) // span, None]
    s = _steps(fits * _inverse(d), -128, 127, lambda s: _centered_error(halves, d * s, 32))
    codes = torch.round(halves * _inverse(d * s)[..., None]).clamp(-32, 31) + 32
    return [header], list(s.to(torch.int8).unbind(3)), codes.flatten(3)


def _by_span(x: torch.Tensor, span: int) -> torch.Tensor:
    """(blocks, lanes, groups, ...) -> (blocks, lanes, headers, span, ...), padded with zeros."""
    groups = x.shape[2]
    span = min(span, max(groups, 1))
    padding = (0, 0) * (x.dim() - 3) + (0, -groups % span if groups else 1)
    return torch.nn.functional.pad(x, padding).unflatten(2, (-1, span))


def _extreme(x: torch.Tensor) -> torch.Tensor:
    """The value of largest size along the last dimension."""
    return x.gather(-1, x.abs().argmax(-1, keepdim=True))[..., 0]


def _steps(x: torch.Tensor, lowest: int, highest: int, error: Callable) -> torch.Tensor:
    """Codes of scales: of the two nearest those with the smaller error(codes)."""
    low, high = x.floor().clamp(lowest, highest), x.ceil().clamp(lowest, highest)
    return torch.where(error(low) <= error(high), low, high)


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale in float32, 0 for 0."""
    return torch.where(scale != 0, 1 / scale.float(), 0)


def half_above(x: torch.Tensor) -> torch.Tensor:
    """float16 not smaller in size than x: multiples of it up to the largest code reach what x is
    of, where float16 has few digits too.
    """
    half = x.half()
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float().abs() < x.abs(), above, half)


def half_scale(x: torch.Tensor) -> torch.Tensor:
    """The nearest float16; a subnormal one, which has few digits or none, is not below x."""
    return torch.where(x.abs() < 2.0**-14, half_above(x), x.half())


# ---- fits of least squared error


def fit_affine(
    w: torch.Tensor, highest: int, importance: torch.Tensor | float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and minimum of codes 0 to `highest` for every group, of least squared error among the
    range of its values and others a little wider or narrower, each refitted. The minimum is at most
    zero.

    Args:
        w: [..., inputs].
        highest: the largest code.
        importance: factors on the squared errors, [..., inputs] or one for all.
    """
    low, high = w.amin(-1).clamp(max=0), w.amax(-1)
    spread = (high - low).clamp(min=0)
    best = spread / highest, low
    error = _squared_error(w, *best, highest, importance)
    for step in range(-4, 9):
        scale, minimum = _refit(w, spread / (highest + 0.25 * step), low, highest, importance)
        found = _squared_error(w, scale, minimum, highest, importance)
        better = (found < error) & (spread > 0)
        best = torch.where(better, scale, best[0]), torch.where(better, minimum, best[1])
        error = torch.where(better, found, error)
    return best


def _refit(w, scale, minimum, highest, importance):
    """By least squares, for the codes that these give."""
    q = _codes(w, scale, minimum, highest)
    n, sum_q, sum_qq, sum_w, sum_qw = (
        (importance * x).sum(-1) for x in (torch.ones_like(w), q, q * q, w, q * w)
    )
    determinant = n * sum_qq - sum_q * sum_q
    new_scale = (n * sum_qw - sum_q * sum_w) / determinant
    new_minimum = (sum_qq * sum_w - sum_q * sum_qw) / determinant
    positive = new_minimum > 0
    new_scale = torch.where(positive, sum_qw / sum_qq, new_scale)
    valid = (determinant > 0) & (new_scale > 0)
    return (
        torch.where(valid, new_scale, scale),
        torch.where(valid, new_minimum.clamp(max=0), minimum),
    )


def _codes(w, scale, minimum, highest):
    return torch.round(((w - minimum[..., None]) * _inverse(scale)[..., None]).clamp(0, highest))


def _squared_error(w, scale, minimum, highest, importance):
    values = scale[..., None] * _codes(w, scale, minimum, highest) + minimum[..., None]
    return (importance * (values - w).square()).sum(-1)


def _centered_error(w, scale, center):
    codes = torch.round(w * _inverse(scale)[..., None]).clamp(-center, center - 1)
    return (w - scale[..., None] * codes).square().sum(-1)


def fit_centered(w: torch.Tensor, center: int) -> torch.Tensor:
    """Scale of codes -center to center - 1, of least squared error likewise: the one that makes the
    value of largest size -center, and some near it, each refitted.

    Args:
        w: [..., inputs].
    """
    top = _extreme(w)
    best, error = top / -center, torch.full_like(top, torch.inf)
    margin = 1e-8 * top.square()  # more than what errors are rounded by
    for step in range(-4, 5):
        # torch rounds a number divided by a tensor twice: codes half way would be other ones.
        inverse = torch.where(top != 0, torch.full_like(top, -center + 0.25 * step) / top, 0)
        q = torch.round(w * inverse[..., None]).clamp(-center, center - 1)
        scale = (q * w).sum(-1) / (q * q).sum(-1)
        found = (w - scale[..., None] * q).square().sum(-1)
        better = found + margin < error
        best, error = torch.where(better, scale, best), torch.where(better, found, error)
    return best
