"""Attention: softmax(q k' * scale + bias) v over grouped heads, masked by a few numbers per row,
query or key, not by a [T, S] tensor.
"""

import functools
from typing import Any

import torch
from torch.nn.functional import pad

from mllama.ops._dispatch import check_float, check_value, exact, register, use_kernel

_SMALLEST_HEAD, _LARGEST_HEAD = 16, 256  # of the kernel


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    query_offset: int | torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    prefix_length: torch.Tensor | None = None,
    first_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """Scaled dot-product attention of T queries over S keys, H query heads sharing KV key heads (H
    a multiple of KV).

    A query sees a key when every one of these lets it: `key_mask`, a `key_bias` above -inf,
    `first_key` and, with `causal`, the causal limit or the prefix. A query that sees no key gets
    zeros, and zero gradients. Scores, softmax and sums are float32 whatever the inputs' type.

    Args:
        q: [B, T, H, D], float32, bfloat16 or float16; 1 <= D <= 256, from 16 on without a copy.
        k: [B, S, KV, D] in q's type. A cache laid out [B, KV, S, D] comes as `.transpose(1, 2)`:
            strides are free, the last one best 1.
        v: as k.
        scale: factor on q k'; D**-0.5 when None.
        causal: query i of row b sees key j only when j <= i + query_offset[b], or j <
            prefix_length[b] (or prefix_length[b, i]).
        query_offset: position of query 0 among the keys: an int, or int64 [], [1] or [B]. None is S
            - T: the last query sees the last key. Any value is valid: an offset below -T hides
              every key, one above S hides none. Only with `causal`.
        key_mask: bool [B, S], True where a key may be seen: padding on either side, or holes.
        key_bias: float32 [B or 1, S] added to the scores after scaling; log(n) makes one key count
            as n equal ones, -inf and NaN hide it. It gets no gradient.
        prefix_length: int64 [B], keys at the front that every query sees (a bidirectional prefix),
            or [B, T], of each query. Only with `causal`.
        first_key: int64 [B or 1, T], query i of row b sees key j only when j >= first_key[b, i]. Of
            rows that hold several sequences it is where the query's own one begins: with `causal`
            each is then as if alone, and keys of others cost no time. Any value is valid.

    Returns:
        [B, T, H, D], contiguous, in q's type.

    Raises:
        TypeError: a tensor or argument of the wrong type.
        ValueError: shapes that do not fit, D out of range, devices that differ, an int offset
            beyond 2**62, a key_bias that asks for a gradient.
    """
    masks = (key_mask, key_bias, query_offset, prefix_length, first_key)
    _check_types(q, k, scale, causal, *masks)
    _check_kind("v", v, q)
    if q.dim() == 4 and not _SMALLEST_HEAD <= q.shape[-1] <= _LARGEST_HEAD:
        _check_sizes(q, k, v, causal, *masks)
        size = q.shape[-1]
        q, k, v = (
            pad(x, (0, _SMALLEST_HEAD - size)) for x in (q, k, v)
        )  # zeros change no score, and what they give is cut off
        options: dict[str, Any] = {
            "causal": causal,
            "query_offset": query_offset,
            "key_mask": key_mask,
            "key_bias": key_bias,
        }
        options |= {"prefix_length": prefix_length, "first_key": first_key}
        return attention(q, k, v, scale=size**-0.5 if scale is None else scale, **options)[
            ..., :size
        ].contiguous()
    if use_kernel(q):
        if query_offset is not None and not isinstance(query_offset, torch.Tensor):
            query_offset = torch.full((1,), query_offset, dtype=torch.int64, device=q.device)
        return _attention(
            q, k, v, key_mask, key_bias, query_offset, prefix_length, first_key, causal, scale
        )[0]
    _check_sizes(q, k, v, causal, *masks)
    options = {
        "query_offset": query_offset,
        "key_mask": key_mask,
        "key_bias": key_bias,
        "prefix_length": prefix_length,
    }
    return reference(q, k, v, scale=scale, causal=causal, first_key=first_key, **options)


def attention_weights(
    q: torch.Tensor,
    k: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    query_offset: int | torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    prefix_length: torch.Tensor | None = None,
    first_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """The probabilities `attention` weighs v with: [B, H, T, S] float32, rows summing to 1 (or to 0
    where a query sees no key).

    Arguments and errors as `attention`. For looking at attention: always plain torch, and T x S
    large.
    """
    masks = (key_mask, key_bias, query_offset, prefix_length, first_key)
    _check_types(q, k, scale, causal, *masks)
    _check_sizes(q, k, k, causal, *masks)
    with exact(q):
        return _probabilities(q, k, scale, causal, *masks).flatten(1, 2)


def reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    *,
    scale: float | None = None,
    causal: bool = False,
    query_offset: int | torch.Tensor | None = None,
    key_mask: torch.Tensor | None = None,
    key_bias: torch.Tensor | None = None,
    prefix_length: torch.Tensor | None = None,
    first_key: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention` in plain torch: what it computes, written down. Takes float64 too."""
    with exact(q):
        probabilities = _probabilities(
            q, k, scale, causal, key_mask, key_bias, query_offset, prefix_length, first_key
        )
        out = torch.einsum("bkgts,bskd->btkgd", probabilities, v.to(probabilities.dtype))
    return out.reshape(q.shape).to(q.dtype)


def _probabilities(
    q, k, scale, causal, key_mask, key_bias, query_offset, prefix_length, first_key
) -> torch.Tensor:
    """[B, KV, H / KV, T, S] in float32 (float64 for float64 q)."""
    (batch, queries, heads, size), (keys, kv_heads) = q.shape, k.shape[1:3]
    dtype = torch.promote_types(q.dtype, torch.float32)
    grouped = q.reshape(
        batch, queries, kv_heads, heads // kv_heads, size
    )  # the query heads that share a key head, side by side
    scores = torch.einsum("btkgd,bskd->bkgts", grouped.to(dtype), k.to(dtype)) * (
        size**-0.5 if scale is None else scale
    )
    if key_bias is not None:
        scores = scores + key_bias[:, None, None, None, :]
    visible = _visible(q, keys, causal, key_mask, key_bias, query_offset, prefix_length, first_key)
    if visible is None:
        return scores.softmax(-1)
    # A finite fill, and zeros after: a row that sees nothing gives zeros and zero gradients, where
    # -inf would give nan.
    scores = scores.masked_fill(~visible, torch.finfo(dtype).min)
    return scores.softmax(-1).masked_fill(~visible, 0)


def _visible(
    q, keys, causal, key_mask, key_bias, query_offset, prefix_length, first_key
) -> torch.Tensor | None:
    """Bool, broadcastable to [B, KV, H / KV, T, S]: which keys each query sees. None when all are
    seen.
    """
    conditions = []  # each broadcastable to [B, T, S]
    key = torch.arange(keys, device=q.device)
    if causal:
        queries = q.shape[1]
        offset = keys - queries if query_offset is None else query_offset
        if isinstance(offset, torch.Tensor):
            offset = offset.clamp(-queries, keys).reshape(
                -1, 1, 1
            )  # beyond these nothing changes, and i + offset cannot overflow
        query = torch.arange(queries, device=q.device)[None, :, None]
        visible = key <= query + offset
        if prefix_length is not None:
            visible = visible | (key < prefix_length.reshape(len(prefix_length), -1, 1))
        conditions.append(visible)
    if first_key is not None:
        conditions.append(key >= first_key[:, :, None])
    if key_mask is not None:
        conditions.append(key_mask[:, None, :])
    if key_bias is not None:
        conditions.append((key_bias > -torch.inf)[:, None, :])
    return functools.reduce(torch.logical_and, conditions)[:, None, None] if conditions else None


def _check_types(
    q, k, scale, causal, key_mask, key_bias, query_offset, prefix_length, first_key
) -> None:
    check_float("attention", q=q)
    _check_kind("k", k, q)
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, (int, float))):
        raise TypeError(f"attention: scale must be a float or None, got {type(scale).__name__}")
    if not isinstance(causal, bool):
        raise TypeError(f"attention: causal must be a bool, got {type(causal).__name__}")
    if query_offset is not None and not isinstance(query_offset, torch.Tensor):
        if isinstance(query_offset, bool) or not isinstance(query_offset, (int, torch.SymInt)):
            raise TypeError(
                f"attention: query_offset must be an int, an int64 tensor or None, got {type(query_offset).__name__}"
            )
        if not -(2**62) < query_offset < 2**62:
            raise ValueError(
                f"attention: query_offset must lie within 2**62 of 0, got {query_offset}"
            )
    elif query_offset is not None:
        _check_mask_type("query_offset", query_offset, torch.int64, q)
    if prefix_length is not None:  # the calls that this spares are felt where one token is decoded
        _check_mask_type("prefix_length", prefix_length, torch.int64, q)
    if first_key is not None:
        _check_mask_type("first_key", first_key, torch.int64, q)
    if key_mask is not None:
        _check_mask_type("key_mask", key_mask, torch.bool, q)
    if key_bias is not None:
        _check_mask_type("key_bias", key_bias, torch.float32, q)
        if key_bias.requires_grad:
            raise ValueError("attention: key_bias gets no gradient; pass key_bias.detach()")


def _check_kind(name, tensor, q) -> None:
    check_float("attention", **{name: tensor})
    if tensor.dtype != q.dtype:
        raise TypeError(
            f"attention: {name} must have q's dtype {q.dtype}, got {tensor.dtype}".replace(
                "torch.", ""
            )
        )
    if tensor.device != q.device:
        raise ValueError(f"attention: {name} is on {tensor.device}, q on {q.device}")


def _check_mask_type(name, tensor, dtype, q) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"attention: {name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dtype != dtype:
        raise TypeError(
            f"attention: {name} must be {dtype}, got {tensor.dtype}".replace("torch.", "")
        )
    if tensor.device != q.device:
        raise ValueError(f"attention: {name} is on {tensor.device}, q on {q.device}")


def _check_sizes(
    q, k, v, causal, key_mask, key_bias, query_offset, prefix_length, first_key
) -> None:
    """What the kernel checks, in the same words."""
    if q.dim() != 4 or k.dim() != 4:
        raise ValueError(
            f"attention: q and k must be [batch, length, heads, head size], got {list(q.shape)} and {list(k.shape)}"
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
    check_value(
        causal or query_offset is None,
        "attention: query_offset has a meaning only with causal=True",
    )
    check_value(
        causal or prefix_length is None,
        "attention: prefix_length has a meaning only with causal=True",
    )
    if isinstance(query_offset, torch.Tensor):
        _check_mask_size("query_offset", query_offset, [batch], [1], [])
    each = prefix_length is not None and prefix_length.dim() == 2
    _check_mask_size("prefix_length", prefix_length, [batch, queries] if each else [batch])
    _check_mask_size("first_key", first_key, [batch, queries], [1, queries])
    _check_mask_size("key_mask", key_mask, [batch, keys])
    _check_mask_size("key_bias", key_bias, [batch, keys], [1, keys])


def _check_mask_size(name, tensor, *shapes) -> None:
    if tensor is not None and list(tensor.shape) not in shapes:
        accepted = " or ".join(dict.fromkeys(str(shape) for shape in shapes if shape))
        raise ValueError(f"attention: {name} must be {accepted}, got {list(tensor.shape)}")


def _setup(ctx, inputs, output):
    q, k, v, *masks, causal, scale = inputs
    out, statistics = output
    ctx.mark_non_differentiable(statistics)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(q, k, v, out, statistics, *masks)
    ctx.causal, ctx.scale = causal, scale


def _derivative(ctx, grad_out, grad_statistics):
    if grad_out is None:
        return (None,) * 10
    return (*_attention_backward(grad_out, *ctx.saved_tensors, ctx.causal, ctx.scale), *(None,) * 7)


def _fake(q, k, v, key_mask, key_bias, query_offset, prefix_length, first_key, causal, scale):
    _check_sizes(q, k, v, causal, key_mask, key_bias, query_offset, prefix_length, first_key)
    batch, queries, heads, _ = q.shape
    return torch.empty_like(q, memory_format=torch.contiguous_format), q.new_empty(
        (batch, heads, queries, 2), dtype=torch.float32
    )


def _fake_backward(
    grad_out,
    q,
    k,
    v,
    out,
    statistics,
    key_mask,
    key_bias,
    query_offset,
    prefix_length,
    first_key,
    causal,
    scale,
):
    return tuple(
        torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (q, k, v)
    )


_attention = register("attention", fake=_fake, backward=_derivative, setup_context=_setup)
_attention_backward = register("_attention_backward", fake=_fake_backward)
