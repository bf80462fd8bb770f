"""Faults that older model files had: each is absent here. Every test is named after its fault."""

import ast
import inspect
from pathlib import Path

import pytest
import torch
from torch import nn

import mllama
from dropin import toys
from dropin.toys import CFG, hidden, ids
from mllama.dropin import model as public
from mllama.dropin.model import (
    FeedForward,
    GroupQueryAttention,
    KVCache,
    Linear_LORA,
    Llama3Model,
    RMSNorm,
    TransformerBlock,
    assign,
    compute_rope_params,
    generate,
    load_weights_into_llama,
    replace_linear_with_lora,
    rope,
)


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


class Falling(nn.Module):
    """Logits that fall with the id and are far above any id: a threshold taken from top-k's indices
    keeps all of them.
    """

    def __init__(self, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.logits = nn.Parameter(torch.linspace(149, 100, 50, dtype=dtype))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.logits.expand(*ids.shape, -1)


def test_top_k_threshold_is_not_taken_from_indices():
    drawn = generate(
        Falling(), torch.zeros(500, 1, dtype=torch.long), 1, 8, temperature=100.0, top_k=3
    )[:, 1]
    assert set(drawn.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_minus_infinity_is_on_the_logits_device_and_of_their_dtype(dtype):
    model, start = Falling(dtype), torch.zeros(2, 1, dtype=torch.long)
    with torch.device(
        "meta"
    ):  # a tensor that is not told where to live is not where the logits are
        tokens = generate(model, start, 2, 8, temperature=1.0, top_k=1)
    assert tokens.tolist() == [[0, 0, 0]] * 2
    assert generate(model, start, 2, 8, top_k=1).tolist() == [[0, 0, 0]] * 2


def test_fc2_has_fc1s_shape_and_the_gate_is_silu_of_fc1_alone():
    feed, x = FeedForward(CFG), torch.randn(3, 64)
    assert feed.fc2.weight.shape == feed.fc1.weight.shape == (96, 64) and feed.fc3.weight.shape == (
        64,
        96,
    )
    close(feed(x), feed.fc3(nn.functional.silu(feed.fc1(x)) * feed.fc2(x)))


def test_dtype_is_the_configs_value_and_not_a_list_of_its_name():
    assert {
        linear.weight.dtype for linear in FeedForward(CFG | {"dtype": torch.bfloat16}).children()
    } == {torch.bfloat16}
    with pytest.raises(ValueError, match="dtype must be"):
        FeedForward(CFG | {"dtype": ["dtype"]})


@pytest.mark.parametrize("use_cache", [False, True])
def test_a_block_returns_x_or_x_and_kv(use_cache):
    x, tables = torch.randn(2, 6, 64), compute_rope_params(16)
    answer = TransformerBlock(CFG)(x, hidden(6), *tables, None, use_cache)
    if use_cache:
        answer, (k, v) = answer
        assert k.shape == v.shape == (2, 2, 6, 16)
    assert answer.shape == x.shape


def test_k_and_v_are_defined_after_the_cache_is_joined():
    attention, tables = GroupQueryAttention(64, 64, 4, 2), compute_rope_params(16)
    x = torch.randn(2, 6, 64)
    _, kv = attention(x[:, :4], *tables, hidden(4), use_cache=True)
    _, (k, v) = attention(x[:, 4:], *tables, hidden(2), past_kv=kv, use_cache=True)
    _, (whole_k, whole_v) = attention(x, *tables, hidden(6), use_cache=True)
    close(k, whole_k)
    close(v, whole_v)


def test_cached_keys_are_of_the_groups_and_not_of_all_heads():
    _, past = Llama3Model(CFG)(ids(), use_cache=True)
    assert past[0][0].shape == (2, CFG["n_kv_groups"], 40, 16)


def test_positions_go_on_after_the_cache():
    model, tokens = toys.by_dict(), ids()
    _, past = model(tokens[:, :39], use_cache=True)
    close(model(tokens[:, 39:], past), model(tokens)[:, 39:])


@pytest.mark.parametrize(
    "make", [lambda: TransformerBlock(CFG), lambda: TransformerBlock(toys.config(), 0)]
)
def test_attention_and_feed_forward_have_shortcuts_of_their_own(make):
    block, x = make(), torch.randn(2, 6, 64)
    nn.init.zeros_(block.ff.fc3.weight)
    arguments = {"x": x} | (
        {} if block.from_config else dict(zip(("cos", "sin"), compute_rope_params(16), strict=True))
    )
    attended = block(**arguments) - x
    assert attended.abs().max() > 1e-3
    fed = make()
    fed.load_state_dict(block.state_dict())
    nn.init.normal_(fed.ff.fc3.weight)
    between = x + attended
    close(fed(**arguments), between + fed.ff(fed.norm2(between)))


def test_norms_are_made_as_they_are_used():
    assert (
        RMSNorm(64).eps == 1e-6
        and RMSNorm(64, 1e-5).eps == 1e-5
        and RMSNorm(dim=64, eps=1e-5).weight.eq(1).all()
    )
    assert {norm.eps for norm in Llama3Model(CFG).modules() if isinstance(norm, RMSNorm)} == {1e-5}


def test_theta_base_is_the_name_and_reaches_the_tables():
    assert "theta_base" in inspect.signature(compute_rope_params).parameters
    model = Llama3Model(CFG | {"rope_base": 1000.0, "rope_freq": None})
    close(model.cos, compute_rope_params(head_dim=16, theta_base=1000.0, context_length=64)[0], 0)
    assert not torch.equal(model.cos, Llama3Model(CFG | {"rope_freq": None}).cos)


def test_an_odd_head_dim_is_refused():
    for call in (
        lambda: compute_rope_params(7),
        lambda: rope(torch.zeros(1, 1, 2, 7), torch.zeros(2, 7), torch.zeros(2, 7)),
        lambda: GroupQueryAttention(28, 28, 4, 2),
        lambda: Llama3Model(CFG | {"emb_dim": 28}),
    ):
        with pytest.raises(ValueError, match="even"):
            call()


def test_a_mask_that_is_not_boolean_is_understood_or_refused():
    attention, x, tables = (
        GroupQueryAttention(64, 64, 4, 2),
        torch.randn(2, 6, 64),
        compute_rope_params(16),
    )
    expected = attention(x, *tables, hidden(6))
    for mask in (
        hidden(6).int(),
        hidden(6).float(),
        torch.zeros(6, 6).masked_fill(hidden(6), -torch.inf),
    ):
        close(attention(x, *tables, mask), expected)
    for mask, words in (
        (torch.ones(6, 6).tril(), "hides every key from a query"),
        (hidden(6) * 2, "must be boolean"),
    ):
        with pytest.raises(ValueError, match=words):
            attention(x, *tables, mask)


def test_scores_are_scaled_before_they_are_masked():
    attention, x, tables = (
        GroupQueryAttention(64, 64, 4, 2),
        torch.randn(1, 6, 64),
        compute_rope_params(16),
    )
    added = torch.zeros(6, 6).masked_fill(hidden(6), -3.0)  # not hidden, so its size counts
    q, k = (
        projection(x).unflatten(-1, (-1, 16)).transpose(1, 2)
        for projection in (attention.W_query, attention.W_key)
    )
    v = attention.W_value(x).unflatten(-1, (-1, 16)).transpose(1, 2).repeat_interleave(2, 1)
    scores = rope(q, *tables) @ rope(k, *tables).repeat_interleave(2, 1).transpose(2, 3) / 4
    expected = attention.out_proj(((scores + added).softmax(-1) @ v).transpose(1, 2).flatten(2))
    close(attention(x, *tables, added), expected)


@pytest.mark.parametrize("name", ["generate", "assign"])
def test_there_is_one_of_each(name):
    folder = Path(public.__file__).parent
    found = [
        path.name
        for path in folder.rglob("*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name == name
    ]
    assert len(found) == 1


def test_assign_keeps_device_and_dtype():
    made = assign(
        nn.Parameter(torch.zeros(3, dtype=torch.float16)), torch.ones(3, dtype=torch.float64)
    )
    assert made.dtype == torch.float16 and made.device.type == "cpu"


def test_frozen_weights_get_no_gradients():
    model = toys.by_dict()
    replace_linear_with_lora(model, rank=4, alpha=8)
    load_weights_into_llama(
        model, CFG, toys.stock().state_dict()
    )  # new parameters, as frozen as those before
    model(ids()).square().mean().backward()
    frozen = [layer.linear.weight for layer in model.modules() if isinstance(layer, Linear_LORA)]
    assert frozen and not any(weight.requires_grad or weight.grad is not None for weight in frozen)
    assert {id(p) for p in model.parameters() if p.grad is not None} == {
        id(p) for p in mllama.lora_parameters(model)
    }


def test_lora_b_leads_from_rank_to_out_dim():
    layer = Linear_LORA(6, 10, 2, 4, 0.0)
    assert layer.lora_a.weight.shape == (2, 6) and layer.lora_b.weight.shape == (10, 2)


@pytest.mark.parametrize("make", [toys.by_dict, lambda: toys.by_config().model])
def test_embeddings_are_not_scaled(make):
    model, tokens = make(), ids()
    inputs = []
    model.trf_blocks[0].norm1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(tokens)
    assert torch.equal(inputs[0], model.tok_emb(tokens))


@pytest.mark.parametrize("mask", [None, torch.ones(2, 40), torch.zeros(2, 1, 40, 40)])
def test_a_decoder_is_causal_without_being_told(mask):
    model, tokens = toys.by_config(), ids()
    other = tokens.clone()
    other[:, 30:] = (other[:, 30:] + 1) % 99
    close(
        model(tokens, attention_mask=mask)[0][:, :30], model(other, attention_mask=mask)[0][:, :30]
    )


def test_one_forward_takes_ids_and_embeddings():
    model, tokens = toys.by_config(), ids()
    close(model(input_embeds=model.model.tok_emb(tokens))[0], model(tokens)[0])


def test_rotary_scaling_of_the_config_is_not_forgotten():
    unscaled = toys.by_config(
        rope_freq=None, rope_parameters={"rope_type": "default", "rope_theta": 500000.0}
    )
    assert not torch.allclose(toys.by_config()(ids())[0], unscaled(ids())[0])


def test_a_cache_of_one_layer_does_not_shift_the_others():
    model, tokens, cache = toys.by_config(), ids(), KVCache()
    for block in model.model.trf_blocks:
        block(model.model.tok_emb(tokens), None, torch.arange(40)[None], cache)
    assert [keys.shape[2] for keys in cache.key_cache] == [40, 40]
