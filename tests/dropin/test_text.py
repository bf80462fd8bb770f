"""The text classes of older scripts against stock transformers and the package's decoder, in both
families' ways of calling them.
"""

import copy
import importlib
import inspect
import pickle

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dropin import toys
from dropin.toys import CFG, hidden, ids
from mllama.dropin import model as public
from mllama.dropin.model import (
    FeedForward,
    GroupQueryAttention,
    KVCache,
    Llama3ForCausalLM,
    Llama3Model,
    LLAMARMSNorm,
    RMSNorm,
    TransformerBlock,
    compute_rope_params,
    convert_to_lora,
    repeat_kv,
)
from mllama.nn.attention import CausalAttention
from mllama.nn.mlp import GatedMLP
from mllama.text.decoder import Decoder, DecoderLayer

BLOCK = [
    "att.W_query",
    "att.W_key",
    "att.W_value",
    "att.out_proj",
    "ff.fc1",
    "ff.fc2",
    "ff.fc3",
    "norm1",
    "norm2",
]


def close(actual, expected, tolerance=1e-5):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


def test_they_are_the_packages():
    pairs = (
        (GroupQueryAttention, CausalAttention),
        (FeedForward, GatedMLP),
        (TransformerBlock, DecoderLayer),
        (Llama3Model, Decoder),
    )
    assert all(issubclass(older, own) for older, own in pairs) and LLAMARMSNorm is RMSNorm


def test_both_modules_names_are_the_same_objects():
    for name in ("model", "llama32_multimodal"):
        module = importlib.import_module(name)
        assert all(getattr(module, entry) is getattr(public, entry) for entry in public.__all__)


def test_signatures():
    def names(call):
        return list(inspect.signature(call).parameters)

    assert names(GroupQueryAttention)[:5] == [
        "d_in",
        "d_out",
        "num_heads",
        "num_kv_groups",
        "dtype",
    ]
    assert names(GroupQueryAttention.forward)[1:7] == [
        "x",
        "cos",
        "sin",
        "mask",
        "past_kv",
        "use_cache",
    ]
    assert names(TransformerBlock)[:2] == ["config", "layer_idx"]
    assert names(TransformerBlock.forward)[1:7] == [
        "x",
        "mask",
        "cos",
        "sin",
        "past_kv",
        "use_cache",
    ]
    assert names(Llama3Model.forward)[1:4] == ["in_idx", "past_kv", "use_cache"]
    assert names(Llama3Model.forward_with_embeds)[1:] == ["inputs_embeds", "past_kv", "use_cache"]
    family_a = ["input_ids", "input_embeds", "attention_mask", "position_ids", "kv_cache"]
    assert names(Llama3ForCausalLM.forward)[1:] == family_a and set(family_a) < set(
        names(Llama3Model.forward)
    )
    for kind in (RMSNorm, LLAMARMSNorm):
        assert {name: p.default for name, p in inspect.signature(kind).parameters.items()} == {
            "dim": inspect.Parameter.empty,
            "eps": 1e-6,
        }


def test_names_of_the_weights():
    blocks = [f"trf_blocks.{index}.{part}.weight" for index in range(2) for part in BLOCK]
    assert list(Llama3Model(CFG).state_dict()) == [
        "tok_emb.weight",
        *blocks,
        "final_norm.weight",
        "out_head.weight",
    ]
    assert list(Llama3Model(toys.config()).state_dict()) == [
        "tok_emb.weight",
        *blocks,
        "final_norm.weight",
    ]
    names = [f"model.{name}" for name in ("tok_emb.weight", *blocks, "final_norm.weight")]
    assert list(Llama3ForCausalLM(toys.config()).state_dict()) == [*names, "lm_head.weight"]


def test_buffers_of_a_model_of_a_dict():
    model = Llama3Model(CFG)
    assert [name for name, _ in model.named_buffers()] == [
        "cos",
        "sin",
    ] and model.cos.shape == model.sin.shape == (64, 16)
    close(model.cos, compute_rope_params(16, 500000.0, 64, CFG["rope_freq"])[0], 0)


def test_logits_are_stock_transformers_and_the_packages():
    tokens, model = ids(), toys.by_dict()
    with torch.no_grad():
        logits = model(tokens)
        close(logits, toys.stock()(tokens).logits, 1e-4)
        close(logits, model.out_head(toys.decoder()(tokens).last_hidden_state), 0)
        close(toys.by_config()(tokens)[0], logits, 0)
        close(toys.by_config().model(tokens), toys.decoder()(tokens).last_hidden_state, 0)


def test_logits_without_frequency_scaling_are_stock_transformers():
    stock = toys.stock(rope_scaling={"rope_type": "default"})
    close(toys.by_dict(rope_freq=None)(ids()), stock(ids()).logits, 1e-4)


def test_gradients_are_stock_transformers():
    model, stock = toys.by_dict(), toys.stock()
    model(ids()).square().mean().backward()
    stock(ids()).logits.square().mean().backward()
    close(
        model.trf_blocks[0].att.W_key.weight.grad,
        stock.model.layers[0].self_attn.k_proj.weight.grad,
        1e-4,
    )
    close(model.tok_emb.weight.grad, stock.model.embed_tokens.weight.grad, 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_and_logits_are_of_the_configs_dtype(dtype):
    for model in (Llama3Model(CFG | {"dtype": dtype}), Llama3ForCausalLM(toys.config(dtype=dtype))):
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        logits = model(ids())
        assert (logits if isinstance(model, Llama3Model) else logits[0]).dtype == dtype
    for part in (
        TransformerBlock(CFG | {"dtype": dtype}),
        FeedForward(CFG | {"dtype": dtype}),
        FeedForward(toys.config(dtype=dtype)),
    ):
        assert {parameter.dtype for parameter in part.parameters()} == {dtype}
    assert torch.get_default_dtype() == torch.float32


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.3), (torch.float16, 0.05)])
def test_half_precision_keeps_the_tables(dtype, tolerance):
    model = toys.by_dict()
    half = copy.deepcopy(model).to(dtype)
    assert half.cos.dtype == half.sin.dtype == torch.float32
    assert half(ids()).dtype == dtype
    close(half(ids()).float(), model(ids()), tolerance)
    close(half.float()(ids()), model(ids()), tolerance)


def test_copies_and_files():
    model = toys.by_dict()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(other(ids()), model(ids()), 0)


def test_the_meta_device(monkeypatch):
    with torch.device("meta"):
        model = Llama3Model(CFG)
    source, empty_like = toys.by_dict(), torch.empty_like
    monkeypatch.setattr(
        torch, "empty_like", lambda *args, **kwargs: empty_like(*args, **kwargs).fill_(torch.nan)
    )
    model = model.to_empty(device="cpu")
    model.load_state_dict(source.state_dict())
    close(model(ids()), source(ids()), 0)
    close(model.cos, source.cos, 0)


def test_past_kv():
    model, tokens = toys.by_dict(), ids()
    whole = model(tokens)
    first, past = model(tokens[:, :30], use_cache=True)
    before = [tensor.clone() for pair in past for tensor in pair]
    second, more = model(tokens[:, 30:], past_kv=past, use_cache=True)
    close(torch.cat([first, second], 1), whole)
    assert all(
        map(torch.equal, before, [tensor for pair in past for tensor in pair])
    )  # the caller's is left as it is
    assert len(more) == 2 and {tensor.shape for pair in more for tensor in pair} == {(2, 2, 40, 16)}
    close(model(tokens[:, 30:], past), whole[:, 30:])
    wide = [tuple(repeat_kv(tensor, 2) for tensor in pair) for pair in past]
    close(model(tokens[:, 30:], wide), whole[:, 30:])
    started, held = model(
        tokens[:, :30], [None, None], use_cache=True
    )  # as a script begins its list
    assert torch.equal(started, first) and all(map(torch.equal, held[1], past[1]))


def test_embeddings_in_the_place_of_ids():
    model, tokens = toys.by_dict(), ids()
    embeds = model.tok_emb(tokens)
    close(model.forward_with_embeds(embeds), model(tokens), 0)
    _, past = model.forward_with_embeds(embeds[:, :30], use_cache=True)
    close(model.forward_with_embeds(embeds[:, 30:], past), model(tokens)[:, 30:])
    causal = toys.by_config()
    assert causal.model.get_input_embeddings() is causal.model.tok_emb
    close(causal(input_embeds=causal.model.tok_emb(tokens))[0], causal(tokens)[0], 0)
    close(
        causal(tokens, embeds * 2)[0], causal(input_embeds=embeds * 2)[0], 0
    )  # embeddings come before ids


def test_pooled_patches_before_a_text_in_16_bits():
    model, project = toys.by_dict(dtype=torch.bfloat16), torch.nn.Linear(24, 64)
    pooled = torch.nn.AdaptiveAvgPool1d(4)(torch.randn(2, 9, 24).transpose(1, 2)).transpose(1, 2)
    combined = torch.cat([project(pooled), model.tok_emb(ids(2, 5))], dim=1)
    assert combined.dtype == torch.float32
    logits = model.forward_with_embeds(combined)
    assert logits.shape == (2, 9, 99) and logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert project.weight.grad.abs().max() > 0


@pytest.mark.parametrize("make", [toys.by_dict, lambda: toys.by_config().model])
def test_keywords_of_both_families_work_on_both(make):
    model, tokens = make(), ids()
    whole = model(tokens)
    close(model(in_idx=tokens), whole, 0)
    close(
        model(
            input_ids=tokens, attention_mask=torch.ones(2, 40), position_ids=torch.arange(40)[None]
        ),
        whole,
    )
    cache = KVCache()
    model(input_ids=tokens[:, :30], kv_cache=cache)
    close(model(input_ids=tokens[:, 30:], kv_cache=cache), whole[:, 30:])
    _, past = model(in_idx=tokens[:, :30], use_cache=True)
    close(model(in_idx=tokens[:, 30:], past_kv=past), whole[:, 30:])


def test_a_token_at_a_time_with_a_kv_cache():
    model, tokens = toys.by_config(), ids(2, 8)
    cache, mask, steps = KVCache(), torch.ones(2, 0), []
    for token in tokens.unbind(1):
        mask = torch.cat([mask, torch.ones(2, 1)], 1)
        position_ids = mask.cumsum(-1)[:, -1:] - 1  # floats
        logits, returned = model(
            token[:, None], attention_mask=mask, position_ids=position_ids, kv_cache=cache
        )
        steps.append(logits)
    assert returned is cache and cache.num_items() == 8
    assert [tensor.shape for tensor in cache.key_cache + cache.value_cache] == [(2, 2, 8, 16)] * 4
    close(torch.cat(steps, 1), model(tokens)[0])


def test_kv_cache_by_itself():
    cache, k, v = KVCache(), torch.randn(1, 2, 3, 16), torch.randn(1, 2, 3, 16)
    assert cache.num_items() == 0 and cache.key_cache == cache.value_cache == []
    cache.update(k, v, 0)
    keys, values = cache.update(k, v, layer_idx=0)
    assert cache.num_items() == 6 and keys is cache.key_cache[0] and values is cache.value_cache[0]
    close(keys, torch.cat([k, k], 2), 0)
    filled = KVCache.of([(k, v)])
    assert (
        filled.num_items() == 3 and filled.key_cache[0] is k and filled.value_cache[0] is v
    )  # not copied
    filled.update(k, v, 0)
    assert filled.num_items() == 6 and k.shape[2] == 3


def test_padding():
    model, tokens = toys.by_config(), ids(2, 12)
    mask = torch.ones(2, 12)
    mask[0, :5] = 0
    padded = model(tokens, attention_mask=mask)[0]
    close(padded[:1, 5:], model(tokens[:1, 5:])[0])
    close(padded[1], model(tokens)[0][1])
    added = torch.zeros(2, 1, 1, 12).masked_fill(
        mask[:, None, None] == 0, torch.finfo(torch.float32).min
    )
    position_ids = (mask.cumsum(-1) - 1).clamp(min=0).long()
    close(model(tokens, attention_mask=added, position_ids=position_ids)[0][:, 5:], padded[:, 5:])


def test_additive_masks_stay_causal():
    model, tokens = toys.by_config(), ids(2, 12)
    whole = model(tokens)[0]
    causal = torch.zeros(1, 1, 12, 12).masked_fill(hidden(12), -torch.inf)
    for mask in (
        causal,
        causal.clamp(min=-1e9),
        torch.zeros(2, 1, 12, 12),
        torch.zeros(1, 1, 12, 64),
    ):
        close(model(tokens, attention_mask=mask)[0], whole)
    cache = KVCache()
    model(tokens[:, :8], attention_mask=torch.zeros(1, 1, 8, 8), kv_cache=cache)
    close(
        model(tokens[:, 8:], attention_mask=torch.zeros(1, 1, 4, 12), kv_cache=cache)[0],
        whole[:, 8:],
    )


def plain_attention(attention, x, added):
    """The formula by hand, of one built from sizes; added: [..., T, T]."""
    cos, sin = compute_rope_params(attention.head_dim, context_length=x.shape[1])

    def heads(projection, count):
        return projection(x).unflatten(-1, (count, attention.head_dim)).transpose(1, 2)

    def turn(y):
        first, second = y.chunk(2, -1)
        return y * cos + torch.cat([-second, first], -1) * sin

    q, k = (
        turn(heads(attention.W_query, attention.num_heads)),
        turn(heads(attention.W_key, attention.num_kv_groups)),
    )
    k, v = (
        y.repeat_interleave(attention.group_size, 1)
        for y in (k, heads(attention.W_value, attention.num_kv_groups))
    )
    weights = (q @ k.transpose(2, 3) / attention.head_dim**0.5 + added).softmax(-1)
    return attention.out_proj((weights @ v).transpose(1, 2).flatten(2))


MASKS = {
    "causal": hidden(6),
    "a key for one alone": (hidden(6) | (torch.arange(6) == 0)) & ~torch.eye(6, dtype=torch.bool),
    "sees all": torch.zeros(6, 6, dtype=torch.bool),
    "a window": hidden(6) | hidden(6).T.tril(-3),
    "for each row": torch.stack([hidden(6), torch.zeros(6, 6, dtype=torch.bool)])[:, None],
    "for each head": torch.stack([hidden(6), hidden(6) & hidden(6).roll(1, 1)] * 2)[None],
    "one row of keys": torch.tensor([[False] * 5 + [True]]),
}


@pytest.mark.parametrize("name", MASKS)
def test_any_boolean_mask_is_what_it_says(name):
    attention, x = GroupQueryAttention(64, 64, 4, 2), torch.randn(2, 6, 64)
    cos, sin = compute_rope_params(16, context_length=32)
    added = torch.zeros(MASKS[name].shape).masked_fill(MASKS[name], -torch.inf)
    expected = plain_attention(attention, x, added)
    close(attention(x, cos, sin, MASKS[name]), expected)
    close(attention(x, cos, sin, added), expected)  # numbers to be added
    close(attention(x, cos, sin, MASKS[name].long()), expected)  # 0 and 1


def test_other_numbers_are_added_to_the_scores():
    attention, x = GroupQueryAttention(64, 64, 4, 2), torch.randn(2, 6, 64)
    added = (
        -(torch.arange(6)[:, None] - torch.arange(6)).abs()
        * torch.tensor([0.5, 0.25, 0.1, 0.0])[:, None, None]
    )
    added = added.masked_fill(hidden(6), -torch.inf)[None]
    close(
        attention(x, *compute_rope_params(16, context_length=32), added),
        plain_attention(attention, x, added),
    )
    model, tokens = toys.by_config(), ids(2, 6)
    masked = model(tokens, attention_mask=added)[0]
    assert not torch.allclose(masked, model(tokens)[0])
    close(
        model(tokens, attention_mask=added.masked_fill(hidden(6), -0.5))[0], masked
    )  # causal all the same


def test_causality_and_padding_are_the_operators(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("torch's own attention was called")

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", refuse)
    attention, x, tables = (
        GroupQueryAttention(64, 64, 4, 2),
        torch.randn(2, 6, 64),
        compute_rope_params(16),
    )
    padded = hidden(6).repeat(2, 1, 1, 1)
    padded[0, ..., :2] = True
    for mask in (None, hidden(6), hidden(6)[None, None], hidden(6).float() * -1e9, padded):
        out = attention(x, *tables, mask)
    assert not out[0, :2].any()  # a query that sees nothing gets zeros
    close(out[1], attention(x, *tables, None)[1])
    toys.by_config()(ids(2, 6), attention_mask=padded * torch.finfo(torch.float32).min)
    with pytest.raises(AssertionError, match="torch's own"):
        attention(x, *tables, MASKS["a window"])


def test_attention_by_sizes():
    attention = GroupQueryAttention(
        d_in=24, d_out=48, num_heads=6, num_kv_groups=2, dtype=torch.bfloat16
    )
    sizes = (
        attention.d_out,
        attention.num_heads,
        attention.num_kv_groups,
        attention.head_dim,
        attention.group_size,
    )
    assert sizes == (48, 6, 2, 8, 3)
    assert [
        attention.get_parameter(f"{name}.weight").shape
        for name in ("W_query", "W_key", "W_value", "out_proj")
    ] == [(48, 24), (16, 24), (16, 24), (48, 48)]
    assert attention.W_key.weight.dtype == torch.bfloat16 and attention.W_query.bias is None
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    cos, sin = compute_rope_params(8, context_length=16)
    context, (k, v) = attention(x, cos, sin, hidden(5), None, True)
    assert context.shape == (2, 5, 48) and k.shape == v.shape == (2, 2, 5, 8)
    assert attention(x=x, cos=cos, sin=sin, mask=None).shape == (2, 5, 48)


def test_attention_by_config():
    config = toys.config()
    attention = GroupQueryAttention(config, 1, torch.float32)
    assert attention.layer_idx == 1 and attention.config is config and attention.num_kv_groups == 2
    assert (
        GroupQueryAttention(config=config, layer_idx=3, dtype=torch.float16).W_query.weight.dtype
        == torch.float16
    )
    x, cache = torch.randn(2, 5, 64), KVCache()
    alone = GroupQueryAttention(config)
    alone.load_state_dict(attention.state_dict())
    positions = torch.arange(5)[None]
    whole = alone(x, None, positions)
    close(alone(hidden_states=x, attention_mask=torch.ones(2, 5)), whole, 0)
    steps = [alone(x[:, i : i + 1], None, positions[:, i : i + 1], cache) for i in range(5)]
    close(torch.cat(steps, 1), whole)
    by_sizes = GroupQueryAttention(64, 64, 4, 2)
    by_sizes.load_state_dict(attention.state_dict())
    close(by_sizes(x, *compute_rope_params(16, 500000.0, 64, CFG["rope_freq"]), hidden(5)), whole)


def test_blocks_called_by_a_script():
    model, tokens = toys.by_dict(), ids()
    x = model.tok_emb(tokens)
    for block in model.trf_blocks:
        x = block(x, hidden(40), model.cos, model.sin)
    close(model.out_head(model.final_norm(x)), model(tokens))
    causal, x = toys.by_config(), None
    x = causal.model.tok_emb(tokens)
    for block in causal.model.trf_blocks:
        x = block(x, None, torch.arange(40)[None])
    close(causal.lm_head(causal.model.final_norm(x)), causal(tokens)[0])


def test_blocks_and_attention_with_past_kv():
    block = TransformerBlock(CFG)
    x, (cos, sin) = torch.randn(2, 6, 64), compute_rope_params(16, context_length=16)
    whole = block(x, hidden(6), cos, sin)
    kv, steps = None, []
    for i in range(6):
        step, kv = block(
            x[:, i : i + 1],
            torch.zeros(1, 1, dtype=torch.bool),
            cos,
            sin,
            past_kv=kv,
            use_cache=True,
        )
        steps.append(step)
    close(torch.cat(steps, 1), whole)
    first, kv = block(x[:, :3], hidden(3), cos, sin, None, True)
    close(block(x[:, 3:], hidden(3), cos, sin, kv), whole[:, 3:])  # a mask of the new tokens alone
    close(
        block(x[:, 3:], hidden(6)[3:], cos[3:6], sin[3:6], kv), whole[:, 3:]
    )  # rows of the tables already taken


@pytest.mark.parametrize("kind", [TransformerBlock, FeedForward, Llama3Model])
def test_configs_by_either_name(kind):
    assert sum(p.numel() for p in kind(cfg=CFG).parameters()) >= sum(
        p.numel() for p in kind(config=toys.config()).parameters()
    )
    with pytest.raises(TypeError, match=f"{kind.__name__}: give one of config and cfg"):
        kind()
    with pytest.raises(TypeError, match="give one of"):
        kind(CFG, cfg=CFG)


def test_feed_forward():
    feed, x = FeedForward(CFG), torch.randn(2, 3, 64)
    assert (feed.fc1.out_features, feed.fc2.out_features, feed.fc3.out_features) == (96, 96, 64)
    close(feed(x), feed.fc3(torch.nn.functional.silu(feed.fc1(x)) * feed.fc2(x)))


def test_norm():
    norm, x, residual = RMSNorm(64), torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    norm.weight.data.normal_()
    assert norm.eps == 1e-6 and norm.weight.shape == (64,)
    close(norm(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight)
    close(norm(x, residual), norm(x + residual))
    close(norm(x, residual=residual), norm(x + residual))


def test_every_norm_inside_a_model_has_llamas_eps():
    for model in (Llama3Model(CFG), Llama3ForCausalLM(toys.config())):
        assert {module.eps for module in model.modules() if isinstance(module, RMSNorm)} == {1e-5}


def test_tied_weights():
    model = Llama3ForCausalLM(toys.config())
    assert model.vocab_size == 99 and model.lm_head.weight is not model.model.tok_emb.weight
    model.tie_weights()
    assert model.lm_head.weight is model.model.tok_emb.weight
    assert len(list(model.parameters())) == len(
        list(Llama3ForCausalLM(toys.config(tie_word_embeddings=True)).parameters())
    )


@pytest.mark.parametrize("names", [["W_query", "out_proj"], ["fc1", "fc2", "fc3"], ["out_head"]])
def test_lora_by_the_older_names(names):
    model = toys.by_dict()
    before = model(ids())
    convert_to_lora(model, names, 4, 8)
    close(model(ids()), before)
    model(ids()).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert trained and all(
        ".lora_" in name and name.split(".lora_")[0].endswith(tuple(names)) for name in trained
    )


def test_checkpointed_blocks_and_autocast():
    model, tokens = toys.by_dict(), ids()
    x = model.tok_emb(tokens)
    for block in model.trf_blocks:
        x = checkpoint(block, x, hidden(40), model.cos, model.sin, use_reentrant=False)
    model.out_head(model.final_norm(x)).square().mean().backward()
    expected = toys.by_dict()
    expected(tokens).square().mean().backward()
    close(model.trf_blocks[0].ff.fc1.weight.grad, expected.trf_blocks[0].ff.fc1.weight.grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(tokens).dtype == torch.bfloat16


def test_compiled():
    model = toys.by_dict()
    close(torch.compile(model, backend="aot_eager")(ids()), model(ids()))


def short(model, **given):
    return model(**{"in_idx": ids(2, 1)} | given)


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda m: m(ids(1, 65)), ValueError, "65 tokens .*more than context_length, 64"),
        (
            lambda m: m(ids(2, 5), m(ids(2, 60), use_cache=True)[1]),
            ValueError,
            r"65 tokens \(60 of them cached\)",
        ),
        (lambda m: m(torch.full((1, 3), 99)), IndexError, "vocabulary"),
        (lambda m: m(ids()[0]), ValueError, r"\[batch, tokens\]"),
        (lambda m: m(ids().float()), TypeError, "int64"),
        (lambda m: m(), TypeError, "one of in_idx and input_ids"),
        (lambda m: m(ids(), in_idx=ids()), TypeError, "in_idx given twice"),
        (lambda m: m(ids(), None, False, 1), TypeError, "at most 3 arguments without a name"),
        (lambda m: m(ids(), input_ids=ids()), TypeError, "one of in_idx and input_ids"),
        (
            lambda m: m.forward_with_embeds(torch.zeros(2, 3, 63)),
            ValueError,
            r"\[batch, tokens, 64\]",
        ),
        (lambda m: m.forward_with_embeds([1]), TypeError, "inputs_embeds must be"),
        (lambda m: short(m, past_kv=[1]), ValueError, "list of 2 pairs"),
        (lambda m: short(m, past_kv=[1, 2]), TypeError, "pair of tensors"),
        (
            lambda m: short(m, past_kv=[(torch.zeros(2, 2, 3, 16), torch.zeros(2, 2, 4, 16))] * 2),
            ValueError,
            "one shape",
        ),
        (
            lambda m: short(m, past_kv=[(torch.zeros(3, 2, 3, 16),) * 2] * 2),
            ValueError,
            r"\[2, 2 \(or 4\), past, 16\]",
        ),
        (
            lambda m: short(m, past_kv=[(torch.randn(2, 4, 3, 16),) * 2] * 2),
            ValueError,
            "of one group must be equal",
        ),
        (
            lambda m: short(m, past_kv=[(torch.zeros(2, 2, n, 16),) * 2 for n in (3, 4)]),
            ValueError,
            r"every layer, got \[3, 4\]",
        ),
        (
            lambda m: short(m, past_kv=m(ids(), use_cache=True)[1], kv_cache=KVCache()),
            ValueError,
            "not both",
        ),
        (lambda m: short(m, kv_cache=[]), TypeError, "transformers Cache"),
        (
            lambda m: m(ids(), attention_mask=torch.ones(2, 39)),
            ValueError,
            "attention_mask must cover",
        ),
        (
            lambda m: m(ids(), attention_mask=torch.zeros(1, 1, 40, 40).bool()),
            TypeError,
            "floats to be added",
        ),
        (lambda m: m(ids(), attention_mask=torch.zeros(1, 1, 40, 39)), ValueError, "at least 40"),
        (
            lambda m: m(ids(), attention_mask=torch.ones(1, 1, 40, 40)),
            ValueError,
            "0 where a key is seen",
        ),
        (
            lambda m: m(ids(), attention_mask=torch.zeros(3, 1, 40, 40)),
            ValueError,
            "batch of 1 or 2",
        ),
    ],
)
def test_what_a_model_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call(toys.by_dict())


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda a, x, t: a(x), TypeError, "cos and sin are needed"),
        (
            lambda a, x, t: a(x, t[0][:3], t[1][:3], None),
            ValueError,
            r"cos must be \[at least 6 positions, 16\]",
        ),
        (lambda a, x, t: a(x, *t, torch.ones(4, 6).bool()), ValueError, r"mask must be \[6, 6\]"),
        (lambda a, x, t: a(x, *t, [1]), TypeError, "mask must be a torch.Tensor"),
        (lambda a, x, t: a(x, *t, torch.full((6, 6), 7)), ValueError, "mask must be boolean"),
        (
            lambda a, x, t: a(x, *t, torch.full((6, 6), torch.nan)),
            ValueError,
            "0 where a key is seen",
        ),
        (
            lambda a, x, t: a(x, *t, hidden(6), attention_mask=torch.ones(2, 6)),
            ValueError,
            "mask or attention_mask",
        ),
        (lambda a, x, t: a(x[0], *t, hidden(6)), ValueError, r"\[batch, tokens, width\]"),
        (lambda a, x, t: a(x, *t, hidden(6), (1, 2)), TypeError, "pair of tensors"),
        (
            lambda a, x, t: GroupQueryAttention(64, 64, 5, 2),
            ValueError,
            "multiple of num_kv_groups",
        ),
        (
            lambda a, x, t: GroupQueryAttention(64, 64, 4, 3),
            ValueError,
            "multiple of num_kv_groups",
        ),
        (lambda a, x, t: GroupQueryAttention(64), ValueError, "d_out must be an integer"),
        (lambda a, x, t: Llama3ForCausalLM(CFG), TypeError, "must be a LLAMA32Config"),
    ],
)
def test_what_attention_refuses(call, error, words):
    with pytest.raises(error, match=words):
        call(
            GroupQueryAttention(64, 64, 4, 2),
            torch.randn(2, 6, 64),
            compute_rope_params(16, context_length=32),
        )
