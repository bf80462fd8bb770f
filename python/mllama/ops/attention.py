"""Attention: softmax(q k' * scale + bias) v over grouped heads, masked by a few numbers per row,
query or key instead of a [T, S] tensor.
"""

import functools
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from mllama.ops._dispatch import (
    check_device,
    check_dtype,
    check_number,
    check_tensors,
    dtype_name,
    exact,
    fresh,
    register,
    use_kernel,
)
from mllama.ops.recompute import Saved, restored

_SMALLEST_HEAD, _LARGEST_HEAD = 16, 256  # head sizes of the kernel
_FAR = 2**62  # bound of offsets and windows, so that sums fit int64


class Options(NamedTuple):
    """Arguments of `attention` after q, k and v, in the order of the operator's schema: five masks,
    then numbers.
    """

    key_mask: torch.Tensor | None = None
    key_bias: torch.Tensor | None = None
    query_offset: int | torch.Tensor | None = None
    prefix_length: torch.Tensor | None = None
    first_key: torch.Tensor | None = None
    causal: bool = False
    window: int | None = None
    scale: float | None = None
    softcap: float | None = None


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    softcap: float | None = None,
    causal: bool = False,
    window: int | None = None,
    query_offset: int | torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    prefix_length: torch.Tensor | None = None,
    first_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention of T queries over S keys; H query heads share KV key heads (H a
    multiple of KV).

    A key is visible to a query if all of these allow it: `key_mask`, a `key_bias` above -inf,
    `first_key` and, with `causal`, the causal limit and window or the prefix. A query without
    visible keys gets zeros, and zero gradients. Scores, softmax and sums are float32 for every
    input dtype. Keys that are visible to no query cost no time.

    Args:
        q: [B, T, H, D], float32, bfloat16 or float16; 1 <= D <= 256, copied if D < 16.
        k: [B, S, KV, D] in q's dtype. Any strides, the last one preferably 1: a cache stored as
            [B, KV, S, D] is passed as `.transpose(1, 2)`.
        v: as k.
        scale: factor on q k'. Default: D**-0.5.
        softcap: scores become softcap * tanh(score / softcap), after the scale and before masks and
            key_bias, as in Gemma 2.
        causal: query i of row b has position p = i + query_offset[b] among the keys; keys j <= p
            are visible to it.
        window: only the last `window` of these are visible, p - window < j <= p. Requires `causal`.
        query_offset: position of query 0 among the keys: an int, or int64 [], [1] or [B]. Default:
            S - T, so that the last key is visible to the last query. Any value is valid: below -T
            all keys are hidden. Requires `causal`.
        key_mask: bool [B, S], False hides a key: padding on either side, or gaps.
        key_bias: float32 [B or 1, S], added to the scores after scaling. log(n) makes one key count
            as n equal ones; -inf and NaN hide it. It gets no gradient.
        prefix_length: int64 [B], or [B, T] per query: number of leading keys that attend to each
            other in both directions. For a query at p < prefix_length all j < prefix_length are
            visible, in the window or not; later queries are causal, as in PaliGemma. Requires
            `causal`.
        first_key: int64 [B or 1, T], only keys j >= first_key[b, i] are visible to query i of row
            b. In packed rows it is the start of the query's sequence; with `causal`, each sequence
            is then computed independently. Any value is valid.

    Returns:
        [B, T, H, D], contiguous, in q's dtype.

    Raises:
        TypeError: a tensor or argument has the wrong type.
        ValueError: shapes do not fit, D is out of range, devices differ, an offset or window is
            beyond 2**62, or key_bias requires a gradient.
    """
    options = Options(
        key_mask, key_bias, query_offset, prefix_length, first_key, causal, window, scale, softcap
    )
    _check_numbers(options)
    if use_kernel("attention", q):
        if q.dim() == 4 and q.shape[-1] < _SMALLEST_HEAD:
            _check(q, k, v, *options)
            return _padded(q, k, v, options)
        if query_offset is not None and not isinstance(query_offset, torch.Tensor):
            options = options._replace(
                query_offset=torch.full((1,), query_offset, dtype=torch.int64, device=q.device)
            )
        return _attention(q, k, v, *options)[0]
    _check(q, k, v, *options)
    return reference(q, k, v, **options._asdict())


def attention_weights(q: torch.Tensor, k: torch.Tensor, **options) -> torch.Tensor:
    """The probabilities in `attention`, for inspection: plain torch, and T x S memory.

    Arguments and Raises as `attention`.

    Returns:
        [B, H, T, S] float32, rows summing to 1 (0 for a query without visible keys).
    """
    checked = Options(**options)
    _check_numbers(checked)
    _check(q, k, k, *checked)
    with exact(q):
        return _probabilities(q, k, checked).flatten(1, 2)  # (B, H, T, S)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
    """`attention` in plain torch, with the same arguments. Also accepts float64."""
    with exact(q):
        probabilities = _probabilities(q, k, Options(**options))
        out = torch.einsum("bkgts,bskd->btkgd", probabilities, v.to(probabilities.dtype))
    return out.reshape(q.shape).to(q.dtype)  # (B, T, H, D)


def _padded(q, k, v, options: Options) -> torch.Tensor:
    """Attention of heads smaller than the kernel's minimum: zero padding changes no score, and its
    output columns are cut off.
    """
    size = q.shape[-1]
    wide = (pad(x, (0, _SMALLEST_HEAD - size)) for x in (q, k, v))
    if options.scale is None:
        options = options._replace(scale=size**-0.5)
    return attention(*wide, **options._asdict())[..., :size].contiguous()


def _probabilities(q, k, o: Options) -> torch.Tensor:
    """[B, KV, H / KV, T, S] in float32 (float64 for float64 q)."""
    (batch, queries, heads, size), (keys, kv_heads) = q.shape, k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    # Group the query heads that share a key head.
    q_groups = q.reshape(batch, queries, kv_heads, heads // kv_heads, size)  # (B, T, KV, G, D)
    scores = torch.einsum("btkgd,bskd->bkgts", q_groups.to(dtype), k.to(dtype))
    scores = scores * (size**-0.5 if o.scale is None else o.scale)
    if o.softcap is not None:
        scores = o.softcap * torch.tanh(scores / o.softcap)
    if o.key_bias is not None:
        scores = scores + o.key_bias[:, None, None, None, :]
    visible = _visible(queries, keys, q.device, o)
    if visible is None:
        return scores.softmax(-1)
    # A finite fill value, zeroed afterwards: a row without visible keys gives zeros and zero
    # gradients, where -inf would give NaN.
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    return scores.softmax(-1).masked_fill(~visible, 0)


def _visible(queries: int, keys: int, device: torch.device, o: Options) -> torch.Tensor | None:
    """Bool, broadcastable to [B, KV, H / KV, T, S]: the keys visible to each query. None: all."""
    conditions = []  # each broadcastable to [B, T, S]
    key = torch.arange(keys, device=device)
    if o.causal:
        conditions.append(_causal(queries, key, o))
    if o.first_key is not None:
        conditions.append(key >= o.first_key[:, :, None])
    if o.key_mask is not None:
        conditions.append(o.key_mask[:, None, :])
    if o.key_bias is not None:
        conditions.append((o.key_bias > -torch.inf)[:, None, :])
    return functools.reduce(torch.logical_and, conditions)[:, None, None] if conditions else None


def _causal(queries: int, key: torch.Tensor, o: Options) -> torch.Tensor:
    """The causal limit, window and prefix: bool, broadcastable to [B, T, S]."""
    keys = len(key)
    offset = keys - queries if o.query_offset is None else o.query_offset
    offset = torch.as_tensor(offset, device=key.device).reshape(-1, 1, 1)  # (B or 1, 1, 1)
    query = torch.arange(queries, device=key.device)[None, :, None]
    # Clamped: values beyond have the same effect, and sums cannot overflow.
    position = query + offset.clamp(-queries, _FAR)
    visible = key <= position
    if o.window is not None:
        visible = visible & (
            key > query + (offset.clamp(min=-_FAR) - o.window).clamp(-queries - 1, keys)
        )
    if o.prefix_length is not None:
        per_query = o.prefix_length.dim() == 2
        prefix = o.prefix_length if per_query else o.prefix_length[:, None]
        prefix = prefix[:, :, None]  # (B, T or 1, 1)
        visible = visible | ((position < prefix) & (key < prefix))
    return visible


def _check_numbers(o: Options) -> None:
    """Check the arguments that are not tensors, and that no unsupported gradient is required."""
    for name, value in (("scale", o.scale), ("softcap", o.softcap)):
        if value is not None:
            check_number("attention", name, value, "a float or None")
    if o.softcap is not None and not 1e-30 < o.softcap < 1e30:
        raise ValueError(f"attention: softcap must be a positive number, got {o.softcap}")
    if not isinstance(o.causal, bool):
        raise TypeError(f"attention: causal must be a bool, got {type(o.causal).__name__}")
    if o.window is not None:
        _check_int("window", o.window, "an int or None")
        if not 0 < o.window < _FAR:
            raise ValueError(f"attention: window must be 1 to 2**62 - 1, got {o.window}")
    if o.query_offset is not None and not isinstance(o.query_offset, torch.Tensor):
        _check_int("query_offset", o.query_offset, "an int, an int64 tensor or None")
        if not -_FAR < o.query_offset < _FAR:
            raise ValueError(
                f"attention: query_offset must lie within 2**62 of 0, got {o.query_offset}"
            )
    if o.key_bias is not None and getattr(o.key_bias, "requires_grad", False):
        raise ValueError("attention: key_bias gets no gradient; pass key_bias.detach()")


def _check_int(name: str, value, wanted: str) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"attention: {name} must be {wanted}, got {type(value).__name__}")


def _check(q, k, v, *options) -> None:
    check_tensors("attention", q=q, k=k, v=v)
    for name, x in (("k", k), ("v", v)):
        if x.dtype != q.dtype:
            raise TypeError(
                f"attention: {name} must have q's dtype {dtype_name(q)}, got {dtype_name(x)}"
            )
    _check_sizes(q, k, v)
    o = Options(*options)
    for name in ("window", "query_offset", "prefix_length"):
        if getattr(o, name) is not None and not o.causal:
            raise ValueError(f"attention: {name} has a meaning only with causal=True")
    batch, queries, keys = len(q), q.shape[1], k.shape[1]
    int64 = torch.int64
    _check_mask("key_mask", o.key_mask, q, torch.bool, [batch, keys])
    _check_mask("key_bias", o.key_bias, q, torch.float32, [batch, keys], [1, keys])
    if isinstance(o.query_offset, torch.Tensor):
        _check_mask("query_offset", o.query_offset, q, int64, [batch], [1], [])
    per_query = getattr(o.prefix_length, "ndim", 1) == 2
    shape = [batch, queries] if per_query else [batch]
    _check_mask("prefix_length", o.prefix_length, q, int64, shape)
    _check_mask("first_key", o.first_key, q, int64, [batch, queries], [1, queries])


def _check_sizes(q, k, v) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            "attention: q and k must be [batch, length, heads, head size], "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    (batch, _, heads, size), (k_batch, _, kv_heads, k_size) = q.shape, k.shape
    if not 1 <= size <= _LARGEST_HEAD:
        raise ValueError(
            f"attention: the head size (last of q) must be 1 to {_LARGEST_HEAD}, got {size}"
        )
    if k_batch != batch or k_size != size:
        raise ValueError(
            f"attention: q {list(q.shape)} and k {list(k.shape)} must agree in batch and head size"
        )
    if kv_heads == 0 or heads % kv_heads != 0:
        raise ValueError(f"attention: q's {heads} heads must be a multiple of k's {kv_heads}")
    if v.shape != k.shape:
        raise ValueError(f"attention: v must have k's shape {list(k.shape)}, got {list(v.shape)}")


def _check_mask(name: str, mask, q, dtype: torch.dtype, *shapes: list[int]) -> None:
    if mask is None:
        return
    check_dtype("attention", name, mask, dtype)
    check_device("attention", name, mask, "q", q)
    if list(mask.shape) not in shapes:
        accepted = " or ".join(dict.fromkeys(str(shape) for shape in shapes if shape))
        raise ValueError(f"attention: {name} must be {accepted}, got {list(mask.shape)}")


def _setup(ctx, inputs, output):
    q, k, v, *options = inputs
    out, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    masks, ctx.numbers = options[:5], options[5:]
    # Normalized and rotated heads are computed again from what their norms save.
    (ctx.q, q_from), (ctx.k, k_from) = Saved.of(q), Saved.of(k)
    ctx.ends = len(q_from), len(q_from) + len(k_from)
    ctx.save_for_backward(*q_from, *k_from, v, out, statistics, *masks)


def _derivative(ctx, grad_out, grad_statistics):
    none = (None,) * len(Options._fields)
    if grad_out is None:
        return (None, None, None, *none)
    (first, last), saved = ctx.ends, ctx.saved_tensors
    q, k = restored(ctx.q, saved[:first]), restored(ctx.k, saved[first:last])
    return (*_attention_backward(grad_out, q, k, *saved[last:], *ctx.numbers), *none)


def _fake(q, k, v, *options):
    batch, queries, heads, _ = q.shape
    return fresh(q), q.new_empty((batch, heads, queries, 2), dtype=torch.float32)


_attention = register(
    "attention", check=_check, fake=_fake, backward=_derivative, setup_context=_setup
)
_attention_backward = register(
    "_attention_backward", fake=lambda grad_out, q, k, v, *rest: (fresh(q), fresh(k), fresh(v))
)
