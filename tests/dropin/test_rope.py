"""Rotary positions in the older functions' layout."""

import inspect
import math

import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as stock_apply

from dropin import toys
from dropin.toys import CFG, ROPE_FREQ
from mllama.dropin.model import (
    LLAMARotaryEmbedding,
    apply_rotary_pos_emb,
    compute_rope_params,
    repeat_kv,
    rope,
    rotate_half,
)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_signature():
    parameters = inspect.signature(compute_rope_params).parameters
    defaults = {
        "theta_base": 10000,
        "context_length": 4096,
        "freq_config": None,
        "dtype": torch.float32,
    }
    assert (
        list(parameters) == ["head_dim", *defaults]
        and {name: parameters[name].default for name in defaults} == defaults
    )


def test_values():
    cos, sin = compute_rope_params(head_dim=8, context_length=16)
    assert cos.shape == sin.shape == (16, 8) and cos.dtype == torch.float32
    for position in (0, 1, 15):
        for element in range(8):
            angle = position / 10000 ** (2 * (element % 4) / 8)
            assert math.isclose(cos[position, element], math.cos(angle), abs_tol=1e-6)
            assert math.isclose(sin[position, element], math.sin(angle), abs_tol=1e-6)


@pytest.mark.parametrize("freq_config", [None, ROPE_FREQ])
def test_tables_are_stock_transformers(freq_config):
    changes = {} if freq_config else {"rope_scaling": {"rope_type": "default"}}
    expected = LlamaRotaryEmbedding(toys.stock(**changes).config)(
        torch.zeros(1), torch.arange(64)[None]
    )
    for table, wanted in zip(
        compute_rope_params(16, 500000.0, 64, freq_config), expected, strict=True
    ):
        close(table, wanted[0], 1e-6)


def test_the_angles_are_float32_whatever_the_tables_are():
    whole, half = (
        compute_rope_params(64, 500000.0, 131072),
        compute_rope_params(64, 500000.0, 131072, dtype=torch.bfloat16),
    )
    for table, rounded in zip(whole, half, strict=True):
        assert rounded.dtype == torch.bfloat16
        close(rounded, table.bfloat16(), 0)


def test_rope_is_stock_transformers():
    x, (cos, sin) = torch.randn(2, 4, 10, 16), compute_rope_params(16, context_length=32)
    expected, _ = stock_apply(x, x, cos[None, :10], sin[None, :10])
    close(rope(x, cos, sin), expected)
    close(rope(x, cos, sin).norm(dim=-1), x.norm(dim=-1))
    assert rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16
    x.requires_grad_()
    rope(x, cos, sin).square().sum().backward()
    close(x.grad, 2 * x.detach())  # a rotation


def test_apply_rotary_pos_emb_is_stock_transformers():
    q, k = torch.randn(2, 4, 10, 16), torch.randn(2, 2, 10, 16)
    cos, sin = LLAMARotaryEmbedding(toys.config())(q, torch.arange(10).repeat(2, 1))
    assert cos.shape == (2, 10, 16)
    expected = stock_apply(q, k, cos, sin)
    for actual, wanted in zip(apply_rotary_pos_emb(q, k, cos, sin), expected, strict=True):
        close(actual, wanted)
    sideways = apply_rotary_pos_emb(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)
    for actual, wanted in zip(sideways, expected, strict=True):
        close(actual.transpose(1, 2), wanted)


def test_rotary_embedding():
    rotary = LLAMARotaryEmbedding(toys.config())
    assert (rotary.dim, rotary.base, rotary.max_position_embeddings) == (16, 500000.0, 2048)
    assert rotary.inv_freq.shape == (8,) and not list(rotary.state_dict())
    cos, sin = rotary(
        torch.zeros(1, dtype=torch.float16), position_ids=torch.arange(64)[None], seq_len=None
    )
    assert cos.dtype == sin.dtype == torch.float16
    tables = compute_rope_params(16, 500000.0, 64, CFG["rope_freq"])
    close(rotary(torch.zeros(1), torch.arange(64.0)[None])[0][0], tables[0], 0)
    assert rotary.half().inv_freq.dtype == torch.float32


def test_rotate_half_and_repeat_kv():
    x = torch.arange(4.0)
    assert rotate_half(x).tolist() == [-2, -3, 0, 1]
    keys = torch.randn(2, 2, 3, 4)
    assert (
        torch.equal(repeat_kv(keys, 3), keys.repeat_interleave(3, 1)) and repeat_kv(keys, 1) is keys
    )


TABLES = compute_rope_params(16, context_length=8)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: compute_rope_params(7), ValueError, "head_dim must be even and positive, got 7"),
        (lambda: compute_rope_params(8, context_length=0), ValueError, "context_length"),
        (
            lambda: compute_rope_params(8, freq_config={"factor": 2.0}),
            ValueError,
            "needs 'low_freq_factor'",
        ),
        (
            lambda: rope(torch.zeros(1, 1, 2, 7), *(table[:, :7] for table in TABLES)),
            ValueError,
            "must be even, got 7",
        ),
        (
            lambda: rope(torch.zeros(1, 2, 16), *TABLES),
            ValueError,
            r"\[batch, heads, tokens, head_dim\]",
        ),
        (lambda: rope(torch.zeros(1, 1, 9, 16), *TABLES), ValueError, "at least 9 positions, 16"),
        (
            lambda: rope(torch.zeros(1, 1, 2, 16), TABLES[0][:, :8], TABLES[1]),
            ValueError,
            r"cos must be .*, 16\]",
        ),
        (
            lambda: rope(torch.zeros(1, 1, 2, 16), TABLES[0], TABLES[1].cumsum(-1)),
            ValueError,
            "two halves of sin",
        ),
        (
            lambda: rope(torch.zeros(1, 1, 2, 16), TABLES[0].long(), TABLES[1]),
            TypeError,
            "cos must be a floating",
        ),
        (
            lambda: apply_rotary_pos_emb(*[torch.zeros(1, 1, 8, 16)] * 2, *TABLES, 3),
            ValueError,
            "unsqueeze_dim",
        ),
    ],
)
def test_what_is_refused(call, error, words):
    with pytest.raises(error, match=words):
        call()
