"""Attention: softmax(q k' * scale + bias) v over grouped heads, masked by a few numbers per row,
query or key, not by a [T, S] tensor.
"""

import functools
from typing import NamedTuple

import torch
from torch.nn.functional import pad

from mllama.ops._dispatch import check_float, exact, register, use_kernel

_SMALLEST_HEAD, _LARGEST_HEAD = 16, 256  # of the kernel
_FAR = 2**62  # offsets and windows stay below it, so that their sums fit int64


class Options(NamedTuple):
    """What `attention` takes beside q, k and v, in the order of the operator's schema."""

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
    """Scaled dot-product attention of T queries over S keys, H query heads sharing KV key heads (H
    a multiple of KV).

    A query sees a key when all of these allow it: `key_mask`, a `key_bias` above -inf, `first_key`
    and, with `causal`, the causal limit and window or the prefix. A query that sees no key gets
    zeros, and zero gradients. Scores, softmax and sums are float32 whatever the inputs' type. Keys
    that no query sees cost no time.

    Args:
        q: [B, T, H, D], float32, bfloat16 or float16; 1 <= D <= 256, from 16 on without a copy.
        k: [B, S, KV, D] in q's dtype. Any strides, the last one best 1: a cache laid out
            [B, KV, S, D] is passed as `.transpose(1, 2)`.
        v: as k.
        scale: factor on q k'. Default: D**-0.5.
        softcap: scores become softcap * tanh(score / softcap), after the scale and before masks and
            key_bias, as in Gemma 2.
        causal: query i of row b is at position p = i + query_offset[b] of the keys and sees keys
            j <= p.
        window: it sees only the last `window` of them, p - window < j <= p. Only with `causal`.
        query_offset: position of query 0 among the keys: an int, or int64 [], [1] or [B]. Default:
            S - T, so that the last query sees the last key. Any value is valid: below -T hides
            every key. Only with `causal`.
        key_mask: bool [B, S], False hides a key: padding on either side, or holes.
        key_bias: float32 [B or 1, S] added to the scores after scaling; log(n) makes one key count
            as n equal ones, -inf and NaN hide it. It gets no gradient.
        prefix_length: int64 [B], or [B, T] of each query: keys at the front that attend to each
            other in both directions. A query at p < prefix_length sees all j < prefix_length, in
            the window or not; later queries are causal, as in PaliGemma. Only with `causal`.
        first_key: int64 [B or 1, T], query i of row b sees only keys j >= first_key[b, i]. In rows
            that hold several sequences it is where the query's own one begins: with `causal` each
            is then computed as if alone. Any value is valid.

    Returns:
        [B, T, H, D], contiguous, in q's dtype.

    Raises:
        TypeError: a tensor or argument of the wrong type.
        ValueError: shapes that do not fit, D out of range, devices that differ, an offset or window
            beyond 2**62, a key_bias that asks for a gradient.
    """
    options = Options(
        key_mask, key_bias, query_offset, prefix_length, first_key, causal, window, scale, softcap
    )
    _check_types(q, k, options)
    _check_dtype("v", v, q)
    if q.dim() == 4 and not _SMALLEST_HEAD <= q.shape[-1] <= _LARGEST_HEAD:
        _check_sizes(q, k, v, options)
        return _padded(q, k, v, options)
    if use_kernel(q):
        if query_offset is not None and not isinstance(query_offset, torch.Tensor):
            options = options._replace(
                query_offset=torch.full((1,), query_offset, dtype=torch.int64, device=q.device)
            )
        return _attention(q, k, v, *options)[0]
    _check_sizes(q, k, v, options)
    return reference(q, k, v, **options._asdict())


def attention_weights(q: torch.Tensor, k: torch.Tensor, **options) -> torch.Tensor:
    """The probabilities `attention` weighs v with: [B, H, T, S] float32, rows summing to 1 (or to 0
    where a query sees no key).

    Arguments and errors as `attention`. For inspection: always plain torch, and T x S large.
    """
    checked = Options(**options)
    _check_types(q, k, checked)
    _check_sizes(q, k, k, checked)
    with exact(q):
        return _probabilities(q, k, checked).flatten(1, 2)  # (B, H, T, S)


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options) -> torch.Tensor:
    """`attention` in plain torch, with the same arguments: what it computes, written down. Takes
    float64 too.
    """
    with exact(q):
        probabilities = _probabilities(q, k, Options(**options))
        out = torch.einsum("bkgts,bskd->btkgd", probabilities, v.to(probabilities.dtype))
    return out.reshape(q.shape).to(q.dtype)  # (B, T, H, D)


def _padded(q, k, v, options: Options) -> torch.Tensor:
    """Attention of heads smaller than the kernel takes: zeros change no score, and the columns they
    give are cut off.
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
    # The query heads that share a key head, side by side.
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
    # A finite fill, and zeros after: a row that sees nothing gives zeros and zero gradients, where
    # -inf would give nan.
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    return scores.softmax(-1).masked_fill(~visible, 0)


def _visible(queries: int, keys: int, device: torch.device, o: Options) -> torch.Tensor | None:
    """Bool, broadcastable to [B, KV, H / KV, T, S]: which keys each query sees. None: all."""
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
    # Beyond -queries and keys nothing changes, and sums cannot overflow.
    position = query + offset.clamp(-queries, keys)
    visible = key <= position
    if o.window is not None:
        visible = visible & (
            key > query + (offset.clamp(min=-_FAR) - o.window).clamp(-queries - 1, keys)
        )
    if o.prefix_length is not None:
        prefix = o.prefix_length.reshape(len(o.prefix_length), -1, 1)  # (B, T or 1, 1)
        visible = visible | ((position < prefix) & (key < prefix))
    return visible


_MASK_DTYPES = {
    "key_mask": torch.bool,
    "key_bias": torch.float32,
    "query_offset": torch.int64,
    "prefix_length": torch.int64,
    "first_key": torch.int64,
}


def _check_types(q, k, o: Options) -> None:
    check_float("attention", q=q)
    _check_dtype("k", k, q)
    _check_number("scale", o.scale)
    _check_number("softcap", o.softcap)
    if o.softcap is not None and not 1e-30 < o.softcap < 1e30:
        raise ValueError(f"attention: softcap must be a positive number, got {o.softcap}")
    if not isinstance(o.causal, bool):
        raise TypeError(f"attention: causal must be a bool, got {type(o.causal).__name__}")
    if o.window is not None:
        _check_int("window", o.window)
        if not 0 < o.window < _FAR:
            raise ValueError(f"attention: window must be 1 to 2**62 - 1, got {o.window}")
    for name, dtype in _MASK_DTYPES.items():
        mask = getattr(o, name)
        if mask is not None:  # the calls that this spares are felt where one token is decoded
            _check_mask_type(name, mask, dtype, q)
    if o.key_bias is not None and o.key_bias.requires_grad:
        raise ValueError("attention: key_bias gets no gradient; pass key_bias.detach()")


def _check_number(name: str, value) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float))):
        raise TypeError(f"attention: {name} must be a float or None, got {type(value).__name__}")


def _check_int(name: str, value) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"attention: {name} must be an int or None, got {type(value).__name__}")


def _check_dtype(name: str, tensor, q) -> None:
    check_float("attention", **{name: tensor})
    if tensor.dtype != q.dtype:
        raise TypeError(
            f"attention: {name} must have q's dtype {q.dtype}, got {tensor.dtype}".replace(
                "torch.", ""
            )
        )
    if tensor.device != q.device:
        raise ValueError(f"attention: {name} is on {tensor.device}, q on {q.device}")


def _check_mask_type(name: str, mask, dtype: torch.dtype, q) -> None:
    if name == "query_offset" and not isinstance(mask, torch.Tensor):
        if isinstance(mask, bool) or not isinstance(mask, (int, torch.SymInt)):
            raise TypeError(
                f"attention: query_offset must be an int, an int64 tensor or None, "
                f"got {type(mask).__name__}"
            )
        if not -_FAR < mask < _FAR:
            raise ValueError(f"attention: query_offset must lie within 2**62 of 0, got {mask}")
        return
    if not isinstance(mask, torch.Tensor):
        raise TypeError(f"attention: {name} must be a torch.Tensor, got {type(mask).__name__}")
    if mask.dtype != dtype:
        raise TypeError(
            f"attention: {name} must be {dtype}, got {mask.dtype}".replace("torch.", "")
        )
    if mask.device != q.device:
        raise ValueError(f"attention: {name} is on {mask.device}, q on {q.device}")


def _check_sizes(q, k, v, o: Options) -> None:
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            "attention: q and k must be [batch, length, heads, head size], "
            f"got {list(q.shape)} and {list(k.shape)}"
        )
    (batch, queries, heads, size), (k_batch, keys, kv_heads, k_size) = q.shape, k.shape
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
    for name in ("window", "query_offset", "prefix_length"):
        if getattr(o, name) is not None and not o.causal:
            raise ValueError(f"attention: {name} has a meaning only with causal=True")
    if isinstance(o.query_offset, torch.Tensor):
        _check_mask_size("query_offset", o.query_offset, [batch], [1], [])
    each = o.prefix_length is not None and o.prefix_length.dim() == 2
    _check_mask_size("prefix_length", o.prefix_length, [batch, queries] if each else [batch])
    _check_mask_size("first_key", o.first_key, [batch, queries], [1, queries])
    _check_mask_size("key_mask", o.key_mask, [batch, keys])
    _check_mask_size("key_bias", o.key_bias, [batch, keys], [1, keys])


def _check_mask_size(name: str, tensor: torch.Tensor | None, *shapes: list[int]) -> None:
    if tensor is not None and list(tensor.shape) not in shapes:
        accepted = " or ".join(dict.fromkeys(str(shape) for shape in shapes if shape))
        raise ValueError(f"attention: {name} must be {accepted}, got {list(tensor.shape)}")


def _setup(ctx, inputs, output):
    q, k, v, *rest = inputs
    options = Options(*rest)
    out, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    masks, ctx.numbers = options[: len(_MASK_DTYPES)], options[len(_MASK_DTYPES) :]
    ctx.save_for_backward(q, k, v, out, statistics, *masks)


def _derivative(ctx, grad_out, grad_statistics):
    none = (None,) * len(Options._fields)
    if grad_out is None:
        return (None, None, None, *none)
    return (*_attention_backward(grad_out, *ctx.saved_tensors, *ctx.numbers), *none)


def _fake(q, k, v, key_mask, key_bias, query_offset, prefix_length, first_key, *numbers):
    masks = (key_mask, key_bias, query_offset, prefix_length, first_key)
    _check_sizes(q, k, v, Options(*masks, *numbers))
    batch, queries, heads, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (batch, heads, queries, 2), dtype=torch.float32
    )


def _fake_backward(grad_out, q, k, v, *rest):
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v)
    )


_attention = register("attention", fake=_fake, backward=_derivative, setup_context=_setup)
_attention_backward = register("_attention_backward", fake=_fake_backward)
