"""Attention blocks against the formula, written plainly."""

from functools import partial

import pytest
import torch

import tiny
from mllama.nn.attention import BidirectionalAttention, CausalAttention, masked_attention
from mllama.nn.norm import RMSNorm
from mllama.nn.rope import RotaryEmbedding

HIDDEN, HEADS, KV_HEADS, SIZE, LENGTH = 32, 4, 2, 16, 9
ROPE = {"rope_type": "default", "rope_theta": 100.0}
CAUSAL = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    x1, x2 = x.chunk(2, -1)
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    return torch.cat((x1 * cos - x2 * sin, x2 * cos + x1 * sin), -1)


def probabilities(q, k, visible, scale=SIZE**-0.5, softcap=None) -> torch.Tensor:
    """[B, H, T, S] of q [B, T, H, D] and k [B, S, KV, D]; `visible` is bool or added."""
    k = k.repeat_interleave(q.shape[2] // k.shape[2], 2)
    scores = torch.einsum("bthd,bshd->bhts", q, k) * scale
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    hidden = torch.where(visible, 0.0, -torch.inf) if visible.dtype == torch.bool else visible
    return (scores + hidden).softmax(-1)


def weighed(weights: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    v = v.repeat_interleave(weights.shape[1] // v.shape[2], 2)
    return torch.einsum("bhts,bshd->bthd", weights, v)


def block(**options) -> CausalAttention:
    return tiny.randomize(CausalAttention(HIDDEN, HEADS, KV_HEADS, SIZE, 0, bias=True, **options))


def tables(length: int = LENGTH, start: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    return RotaryEmbedding(SIZE, ROPE)(torch.arange(start, start + length)[None])


def by_hand(attn: CausalAttention, x, visible, **scores) -> tuple[torch.Tensor, torch.Tensor]:
    q, k, v = (
        projection(x).unflatten(-1, (-1, SIZE))
        for projection in (attn.q_proj, attn.k_proj, attn.v_proj)
    )
    if attn.has_qk_norm:
        q, k = (
            x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * (norm.weight + 1)
            for x, norm in ((q, attn.q_norm), (k, attn.k_norm))
        )
    q, k = (rotated(x, *tables(x.shape[1])) for x in (q, k))
    weights = probabilities(q, k, visible, **scores)
    return attn.o_proj(weighed(weights, v).flatten(2)), weights


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 3},
        {"scale": 0.7, "softcap": 0.5},
        {"make_norm": partial(RMSNorm, offset=1.0)},
        {"window": 4, "scale": 0.7, "make_norm": partial(RMSNorm, offset=1.0)},
    ],
    ids=["plain", "window", "softcap", "norms", "all"],
)
def test_causal_attention_is_the_formula(options):
    attn, x = block(**options), torch.randn(2, LENGTH, HIDDEN, requires_grad=True)
    key_mask = torch.arange(LENGTH) >= torch.tensor([[0], [3]])
    within = torch.ones_like(CAUSAL).triu(1 - options.get("window", LENGTH))
    visible = (CAUSAL & within & key_mask[:, None])[:, None]  # (B, 1, T, S)
    scores = {name: options[name] for name in ("scale", "softcap") if name in options}
    got, weights = attn(x, tables(), key_mask=key_mask, output_attentions=True)
    rows = visible.any(-1)[:, 0]  # the others see nothing
    expected, wanted = by_hand(attn, x, visible | ~visible.any(-1, keepdim=True), **scores)
    torch.testing.assert_close(got[rows], expected[rows])
    torch.testing.assert_close(weights.transpose(1, 2)[rows], wanted.transpose(1, 2)[rows])
    torch.testing.assert_close(
        torch.autograd.grad(got[rows].square().sum(), x),
        torch.autograd.grad(expected[rows].square().sum(), x),
        rtol=1e-4,
        atol=1e-4,
    )


class ListCache:
    """The least that a layer needs: keys and values laid end to end."""

    def __init__(self):
        self.held = None

    def update(self, layer, k, v):
        self.held = (
            (k, v)
            if self.held is None
            else [torch.cat(pair, 1) for pair in zip(self.held, (k, v), strict=True)]
        )
        return self.held


@pytest.mark.parametrize("options", [{}, {"window": 3, "softcap": 0.5}])
def test_a_cache_changes_nothing(options):
    attn, x, cache = block(**options), torch.randn(2, LENGTH, HIDDEN), ListCache()
    whole, pieces = attn(x, tables())[0], []
    for start, end in ((0, 5), (5, 6), (6, LENGTH)):
        pieces.append(attn(x[:, start:end], tables(end - start, start), cache)[0])
    torch.testing.assert_close(torch.cat(pieces, 1), whole)


@pytest.mark.parametrize("softcap", [None, 0.5])
@pytest.mark.parametrize("kind", ["bool", "numbers", "half numbers"])
def test_a_mask_of_four_dimensions_replaces_all(kind, softcap):
    attn, x = block(window=2, scale=0.7, softcap=softcap), torch.randn(2, LENGTH, HIDDEN)
    visible = (torch.rand(2, HEADS, LENGTH, LENGTH) > 0.5) | torch.eye(LENGTH).bool()
    mask = {
        "bool": visible,
        "numbers": torch.randn(visible.shape).masked_fill(~visible, -torch.inf),
        "half numbers": torch.zeros(visible.shape).masked_fill(~visible, -torch.inf).half(),
    }[kind]
    got, weights = attn(x, tables(), attn_mask=mask, output_attentions=True)
    visible = mask if kind == "bool" else mask.float()
    expected, wanted = by_hand(attn, x, visible, scale=0.7, softcap=softcap)
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(weights, wanted)


@pytest.mark.parametrize("softcap", [None, 0.5])
def test_a_query_that_sees_nothing_gives_zeros_and_no_nan(softcap):
    q = torch.randn(1, 3, HEADS, SIZE, requires_grad=True)
    k, v = torch.randn(2, 1, 4, KV_HEADS, SIZE)
    mask = torch.ones(1, 1, 3, 4, dtype=torch.bool)
    mask[..., 1, :] = False
    out = masked_attention(q, k, v, mask, softcap=softcap)
    assert not out[:, 1].any() and out[:, ::2].all()
    (gradient,) = torch.autograd.grad(out.sum(), q)
    assert gradient.isfinite().all() and not gradient[:, 1].any()


def test_bidirectional_attention_is_the_formula_of_itself_or_a_context():
    attn = tiny.randomize(BidirectionalAttention(HIDDEN, HEADS))
    x, context = torch.randn(2, 5, HIDDEN), torch.randn(2, 7, HIDDEN)
    for given, source in ((None, x), (context, context)):
        got, weights = attn(x, output_attentions=True, context=given)
        q, k, v = (
            projection(part).unflatten(-1, (HEADS, -1))
            for projection, part in ((attn.q_proj, x), (attn.k_proj, source), (attn.v_proj, source))
        )
        visible = torch.ones(5, source.shape[1], dtype=torch.bool)
        wanted = probabilities(q, k, visible, (HIDDEN // HEADS) ** -0.5)
        torch.testing.assert_close(weights, wanted)
        torch.testing.assert_close(got, attn.out_proj(weighed(wanted, v).flatten(2)))


def test_dropout_of_probabilities_is_for_training():
    attn, x = BidirectionalAttention(HIDDEN, HEADS, dropout=0.5), torch.randn(1, 6, HIDDEN)
    assert not torch.equal(attn(x)[0], attn(x)[0])
    attn.eval()
    assert torch.equal(attn(x)[0], attn(x)[0])
