import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

import devices
from helpers import THROWN, BadCall, Sample, check_op, needs_kernels, sliced
from mllama.ops import rope, rope_frequencies, rope_tables
from mllama.ops.rope import reference
from tiny.sizes import LLAMA32

torch.manual_seed(0)


def sample(batch, length, heads, kv_heads, size, tables=1):
    positions = torch.randint(0, 1000, (tables, length))
    q, k = (torch.randn(batch, length, n, size) for n in (heads, kv_heads))
    return Sample((q, k, *rope_tables(positions, rope_frequencies(size))))


def views_of_a_projection():
    """Queries and keys side by side in one tensor, as a fused projection leaves them."""
    whole = torch.randn(2, 5, (4 + 2) * 16)
    q, k = whole.split((4 * 16, 2 * 16), dim=-1)
    return Sample(
        (
            q.unflatten(-1, (4, 16)),
            k.unflatten(-1, (2, 16)),
            *rope_tables(torch.arange(10).view(2, 5), rope_frequencies(16)),
        )
    )


def views_of_rows_that_are_not_aligned():
    """Heads are whole vectors from the first one on, but tokens are an odd number apart."""
    whole = torch.randn(2, 8, 97)
    q, k = whole[..., :64].unflatten(-1, (4, 16)), whole[..., 64:96].unflatten(-1, (2, 16))
    return Sample((q, k, *rope_tables(torch.arange(8)[None], rope_frequencies(16))))


def tables_that_are_not_aligned():
    q, k, cos, sin = sample(1, 5, 2, 1, 32).args
    return Sample((q, k, sliced(cos), sliced(sin)))


Q, K, COS, SIN = sample(2, 3, 4, 2, 8).args


@needs_kernels
def test_rope():
    operator = torch.ops.mllama.rope
    check_op(
        rope,
        reference,
        [
            sample(2, 3, 4, 2, 64),
            views_of_a_projection(),
            views_of_rows_that_are_not_aligned(),
            tables_that_are_not_aligned(),
            sample(3, 4, 1, 3, 26, tables=3),
            sample(1, 0, 2, 2, 8),
            sample(2, 90, 5, 5, 34),
        ],
        differentiable=(0, 1),
        keep_float32=(2, 3),
        second_derivative=True,
        raw=[
            (operator.default, (Q.clone().requires_grad_(), K, COS, SIN, False)),
            (operator.default, (Q, K.clone().requires_grad_(), COS, SIN, True)),
        ],
        bad_calls=[
            BadCall(lambda: rope(Q, None, COS, SIN), TypeError, "k must be a torch.Tensor|k"),
            BadCall(
                lambda: rope(Q.double(), K.double(), COS, SIN),
                TypeError,
                "q must be float32, bfloat16 or float16, got float64",
            ),
            BadCall(
                lambda: rope(Q, K, COS.double(), SIN),
                TypeError,
                "cos must be a float32 torch.Tensor, got torch.float64",
            ),
            BadCall(
                lambda: rope(Q, K, COS, [1.0]),
                TypeError,
                "sin must be a float32 torch.Tensor, got list",
            ),
            BadCall(
                lambda: rope(Q[0], K[0], COS, SIN), ValueError, r"q must be \[B, T, heads, D\]"
            ),
            BadCall(
                lambda: rope(Q[..., :7], K[..., :7], COS, SIN),
                ValueError,
                "head size must be even, got 7",
            ),
            BadCall(lambda: rope(Q, K[:1], COS, SIN), ValueError, r"k must be \[2, 3, heads, 8\]"),
            BadCall(
                lambda: rope(Q, K.bfloat16(), COS, SIN),
                ValueError,
                r"k must be \[2, 3, heads, 8\] of float32, got .* of bfloat16",
            ),
            BadCall(
                lambda: rope(Q, K, COS[:, :2], SIN),
                ValueError,
                r"cos must be \[2 or 1, 3, 4\], got \[1, 2, 4\]",
            ),
            BadCall(
                lambda: rope(Q, K, COS, torch.cat((SIN, SIN), -1)),
                ValueError,
                r"sin must be \[2 or 1, 3, 4\]",
            ),
            BadCall(
                lambda: rope(Q, K, COS.clone().requires_grad_(), SIN),
                ValueError,
                "cos must not require a gradient",
            ),
            BadCall(lambda: operator(Q, K, COS[:, :2], SIN, False), THROWN, "invalid cos"),
            BadCall(lambda: operator(Q, K[:1], COS, SIN, False), THROWN, "invalid k"),
        ],
    )


def test_gradient_of_one_result():
    """Where only the rotated queries are used, the keys' gradient is zero."""
    q, k = Q.clone().requires_grad_(), K.clone().requires_grad_()
    grad_q, grad_k = torch.autograd.grad(
        rope(q, k, COS, SIN)[0].sum(), (q, k), materialize_grads=True
    )
    assert grad_q.any() and not grad_k.any()


def test_matches_transformers():
    config = LlamaConfig(hidden_size=64, num_attention_heads=4, head_dim=16)
    positions = torch.tensor([[5, 6, 7], [0, 1, 100]])
    q, k = torch.randn(2, 3, 4, 16), torch.randn(2, 3, 2, 16)
    expected = apply_rotary_pos_emb(
        q, k, *LlamaRotaryEmbedding(config)(q, positions), unsqueeze_dim=2
    )
    for actual, wanted in zip(
        rope(q, k, *rope_tables(positions, rope_frequencies(16))), expected, strict=True
    ):
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize(
    "scaling", [None, {"rope_type": "default"}, {"type": "linear", "factor": 2.5}, LLAMA32], ids=str
)
def test_frequencies_match_transformers(scaling):
    kind = (scaling or {}).get("rope_type", (scaling or {}).get("type", "default"))
    parameters = {"rope_theta": 500000.0, **(scaling or {}), "rope_type": kind}
    config = LlamaConfig(
        hidden_size=128,
        num_attention_heads=2,
        head_dim=64,
        max_position_embeddings=131072,
        rope_parameters=parameters,
    )
    if kind == "default":
        expected = LlamaRotaryEmbedding(config).inv_freq
    else:
        expected, factor = ROPE_INIT_FUNCTIONS[kind](config, devices.tensor_device())
        assert factor == 1.0
    torch.testing.assert_close(rope_frequencies(64, 500000.0, scaling), expected, rtol=1e-6, atol=0)
    assert torch.equal(
        rope_frequencies(64, scaling=parameters), rope_frequencies(64, 500000.0, scaling)
    )


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        ((7,), ValueError, "head_dim"),
        ((0,), ValueError, "head_dim"),
        ((8.0,), TypeError, "head_dim"),
        ((8, -1.0), ValueError, "theta"),
        ((8, float("nan")), ValueError, "theta"),
        ((8, 1e4, "linear"), TypeError, "scaling"),
        (
            (8, 1e4, {"rope_type": "yarn"}),
            ValueError,
            "unknown rope type 'yarn'; known are default, linear, llama3",
        ),
        ((8, 1e4, {"rope_type": "linear"}), ValueError, "needs 'factor'"),
        ((8, 1e4, {"rope_type": "linear", "factor": 0}), ValueError, "factor"),
        ((8, 1e4, {**LLAMA32, "high_freq_factor": 1.0}), ValueError, "high_freq_factor"),
        ((8, 1e4, {"partial_rotary_factor": 0.5}), ValueError, "partial_rotary_factor"),
    ],
)
def test_bad_frequencies(arguments, error, match):
    with pytest.raises(error, match=match):
        rope_frequencies(*arguments)


@pytest.mark.parametrize(
    ("positions", "frequencies", "error", "match"),
    [
        (torch.zeros(1, 2), torch.ones(4), TypeError, "position_ids"),
        ([[1]], torch.ones(4), TypeError, "position_ids"),
        (torch.zeros(2).long(), torch.ones(4), ValueError, "position_ids"),
        (torch.zeros(1, 2).long(), torch.ones(4).double(), TypeError, "frequencies"),
        (torch.zeros(1, 2).long(), torch.ones(1, 4), ValueError, "frequencies"),
    ],
)
def test_bad_tables(positions, frequencies, error, match):
    with pytest.raises(error, match=match):
        rope_tables(positions, frequencies)
