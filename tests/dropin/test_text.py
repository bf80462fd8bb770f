"""The decoder of older scripts against stock transformers, built from a dict and from a config."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as stock_rotation

import mllama
from dropin import toys
from dropin.toys import CFG, close, hidden, ids
from mllama import Linear_LORA, convert_to_lora, replace_linear_with_lora
from mllama.dropin.config import LLAMA32Config, text_config
from mllama.dropin.generate import load_weights_into_llama
from mllama.dropin.layers import KVCache, LLAMARotaryEmbedding, RMSNorm, compute_rope_params, rope
from mllama.dropin.text import (
    FeedForward,
    GroupQueryAttention,
    Llama3ForCausalLM,
    Llama3Model,
    TransformerBlock,
)

TABLES = compute_rope_params(16, context_length=32)


def pair(length: int, heads: int = 2):
    """A past_kv of one layer."""
    return (torch.zeros(2, heads, length, 16),) * 2


def attention() -> GroupQueryAttention:
    return GroupQueryAttention(64, 64, 4, 2)


# ---- configs


def test_omitted_fields_have_the_older_defaults_under_both_names():
    text = LLAMA32Config(100)
    assert (text.hidden_size, text.n_heads, text.num_attention_heads) == (4096, 32, 32)
    assert (text.n_layers, text.hidden_dim, text.n_kv_groups, text.head_dim) == (16, 8192, 8, 128)
    assert text.context_length == text.max_position_embeddings == 131072
    assert text.rope_parameters == toys.SCALING | {"original_max_position_embeddings": 8192}
    assert (text.rms_norm_eps, text.dtype, text.eos_token_id) == (1e-5, torch.float16, None)


def test_names_of_transformers_and_copies():
    names = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96}
    text = LLAMA32Config(100, 64, **names, rope_theta=1e4, pad_token_id=5, dtype="float32")
    assert (text.n_heads, text.n_kv_groups, text.hidden_dim) == (4, 2, 96)
    assert text.pad_token_index == 5 and text.dtype == torch.float32
    assert text.rope_parameters["rope_theta"] == 1e4
    plain = {"rope_type": "default", "rope_theta": 1e4}
    assert LLAMA32Config(100, emb_dim=128, rope_parameters=plain).rope_parameters == plain
    assert LLAMA32Config(100, max_position_embeddings=9, context_length=50).context_length == 50
    for other in (copy.deepcopy(text), LLAMA32Config(**text.to_dict())):
        assert type(other) is LLAMA32Config and other.to_dict() == text.to_dict()


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"n_layers": 4, "num_hidden_layers": 2}, "n_layers"),
        ({"hidden_size": 63}, "hidden_size"),
        ({"n_kv_groups": 5}, "num_key_value_heads"),
        ({"context_length": 0}, "max_position_embeddings"),
        ({"rope_freq": toys.ROPE_FREQ, "rope_parameters": {"rope_type": "default"}}, "rope_freq"),
        ({"rope_base": 1e4, "rope_parameters": toys.SCALING}, "rope_base"),
        ({"rope_freq": 3}, "rope_freq"),
        ({"rope_freq": {"factor": 2.0}}, "low_freq_factor"),
        ({"dtype": ["dtype"]}, "dtype"),
    ],
)
def test_configs_that_cannot_be(given, named):
    with pytest.raises(ValueError, match=named):
        LLAMA32Config(100, **given)


@pytest.mark.parametrize(
    ("given", "error", "named"),
    [
        (3, TypeError, "config"),
        ({"emb_dim": 64}, ValueError, "vocab_size"),
        (CFG | {"dtype": ["dtype"]}, ValueError, "dtype"),
        (CFG | {"n_heads": 0}, ValueError, "num_attention_heads"),
        (LLAMA32Config(100, attention_bias=True), ValueError, "attention_bias"),
        (LLAMA32Config(100, head_dim=64), ValueError, "head_dim"),
    ],
)
def test_what_the_decoder_cannot_be_built_from(given, error, named):
    with pytest.raises(error, match=named):
        text_config(given)
    plain = text_config(CFG | {"drop_rate": 0.1, "rope_freq": None}).rope_parameters
    assert plain["rope_type"] == "default"


# ---- rotary positions


@pytest.mark.parametrize("freq_config", [None, toys.ROPE_FREQ])
def test_rotary_tables_are_stock_transformers(freq_config):
    config = toys.stock(**{} if freq_config else {"rope_parameters": toys.UNSCALED}).config
    expected = LlamaRotaryEmbedding(config)(torch.zeros(1), torch.arange(64)[None])
    for table, wanted in zip(compute_rope_params(16, 5e5, 64, freq_config), expected, strict=True):
        close(table, wanted[0], 1e-6)


def test_angles_are_float32_whatever_the_tables_are():
    (table, _), (half, _) = (
        compute_rope_params(64, 5e5, 131072, dtype=dtype)
        for dtype in (torch.float32, torch.bfloat16)
    )
    close(half, table.bfloat16(), 0)


def test_rotations_are_stock_transformers():
    x, (cos, sin) = torch.randn(2, 4, 10, 16), TABLES
    close(rope(x, cos, sin), stock_rotation(x, x, cos[None, :10], sin[None, :10])[0])
    assert rope(x.bfloat16(), cos, sin).dtype == torch.bfloat16
    rotary = LLAMARotaryEmbedding(toys.config())
    cos, sin = rotary(x.half(), torch.arange(64.0)[None])
    assert cos.dtype == torch.float16
    tables = compute_rope_params(16, 5e5, 64, toys.ROPE_FREQ)
    close(rotary.half()(x, torch.arange(64)[None])[1][0], tables[1], 0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: compute_rope_params(7),
        lambda: compute_rope_params(8, context_length=0),
        lambda: compute_rope_params(8, freq_config={"factor": 2.0}),
        lambda: rope(torch.zeros(1, 1, 2, 7), torch.zeros(2, 7), torch.zeros(2, 7)),
        lambda: rope(torch.zeros(1, 1, 33, 16), *TABLES),
        lambda: rope(torch.zeros(1, 1, 2, 8), *TABLES),
        lambda: attention()(torch.zeros(1, 33, 64), *TABLES),
        lambda: GroupQueryAttention(28, 28, 4, 2),
        lambda: Llama3Model(CFG | {"emb_dim": 28}),
    ],
)
def test_rotations_that_cannot_be(call):
    with pytest.raises(ValueError):
        call()


def test_theta_and_scaling_of_the_config_reach_the_tables():
    model = Llama3Model(CFG | {"rope_base": 1000.0, "rope_freq": None})
    close(model.cos, compute_rope_params(16, theta_base=1000.0, context_length=64)[0], 0)
    plain = {"rope_freq": None, "rope_parameters": toys.UNSCALED, "rope_base": None}
    scaled, unscaled = toys.by_config(), toys.by_config(**plain)
    assert not torch.allclose(scaled(ids())[0], unscaled(ids())[0])


# ---- values


def test_logits_and_gradients_are_stock_transformers():
    by_dict, by_config, stock = toys.by_dict(), toys.by_config(), toys.stock()
    logits, expected = by_dict(ids()), stock(ids()).logits
    close(logits, expected, 1e-4)
    close(by_config(ids())[0], expected, 1e-4)
    unscaled = toys.stock(rope_parameters=toys.UNSCALED)
    close(toys.by_dict(rope_freq=None)(ids()), unscaled(ids()).logits, 1e-4)
    logits.square().mean().backward()
    expected.square().mean().backward()
    ours, theirs = by_dict.trf_blocks[0], stock.model.layers[0]
    close(ours.att.W_key.weight.grad, theirs.self_attn.k_proj.weight.grad, 1e-4)
    close(by_dict.tok_emb.weight.grad, stock.model.embed_tokens.weight.grad, 1e-4)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 0.3), (torch.float16, 0.05)])
def test_half_precision(dtype, tolerance):
    for made in (Llama3Model(CFG | {"dtype": dtype}), Llama3ForCausalLM(toys.config(dtype=dtype))):
        assert {parameter.dtype for parameter in made.parameters()} == {dtype}
    model, half = toys.by_dict(), toys.by_dict().to(dtype)
    assert half.cos.dtype == half.sin.dtype == torch.float32
    assert half(ids()).dtype == dtype and torch.get_default_dtype() == torch.float32
    close(half(ids()).float(), model(ids()), tolerance)
    close(half.float()(ids()), model(ids()), tolerance)


def test_copies_files_and_the_meta_device():
    model = toys.by_dict()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        close(other(ids()), model(ids()), 0)
    with torch.device("meta"):
        empty, loaded = Llama3Model(CFG), Llama3Model(CFG)
    empty = empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    load_weights_into_llama(loaded, CFG, toys.stock().state_dict())
    close(empty(ids()), model(ids()), 0)
    close(loaded(ids()), model(ids()), 0)


def test_checkpointed_compiled_and_under_autocast():
    model, expected = toys.by_dict(), toys.by_dict()
    x = model.tok_emb(ids())
    for block in model.trf_blocks:
        x = checkpoint(block, x, hidden(40), model.cos, model.sin, use_reentrant=False)
    model.out_head(model.final_norm(x)).square().mean().backward()
    expected(ids()).square().mean().backward()
    weight = "trf_blocks.0.ff.fc1.weight"
    close(model.get_parameter(weight).grad, expected.get_parameter(weight).grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert model(ids()).dtype == torch.bfloat16
    close(torch.compile(model, backend="aot_eager")(ids()), model(ids()))


# ---- caches


def test_past_kv():
    model, tokens = toys.by_dict(), ids()
    whole = model(tokens)
    first, past = model(tokens[:, :30], use_cache=True)
    before = [tensor.clone() for pair in past for tensor in pair]
    second, more = model(tokens[:, 30:], past_kv=past, use_cache=True)
    close(torch.cat([first, second], 1), whole)
    assert all(map(torch.equal, before, [tensor for pair in past for tensor in pair]))
    assert {tensor.shape for pair in more for tensor in pair} == {(2, 2, 40, 16)}
    close(model(tokens, [None, None]), whole)


def test_a_token_at_a_time_with_a_kv_cache():
    model, tokens = toys.by_config(), ids(2, 8)
    cache, mask, steps = KVCache(), torch.ones(2, 0), []
    assert cache.num_items() == 0 and cache.key_cache == []
    for token in tokens.unbind(1):
        mask = torch.cat([mask, torch.ones(2, 1)], 1)
        positions = mask.cumsum(-1)[:, -1:] - 1  # floats
        logits, _ = model(token[:, None], None, mask, positions, cache)
        steps.append(logits)
    assert cache.num_items() == 8
    assert [t.shape for t in cache.key_cache + cache.value_cache] == [(2, 2, 8, 16)] * 4
    close(torch.cat(steps, 1), model(tokens)[0])


@pytest.mark.parametrize(
    ("call", "error", "named"),
    [
        (lambda m, c: m(ids(1, 65)), ValueError, "context_length"),
        (lambda m, c: m(ids(2, 5), m(ids(2, 60), use_cache=True)[1]), ValueError, "context_length"),
        (lambda m, c: m(torch.full((1, 3), 99)), IndexError, None),
        (lambda m, c: m(ids()[0]), ValueError, "ids"),
        (lambda m, c: m(ids(), attention_mask=torch.ones(2, 40)), TypeError, "attention_mask"),
        (lambda m, c: m.forward_with_embeds(torch.zeros(2, 3, 63)), ValueError, "63"),
        (lambda m, c: m(ids(2, 1), past_kv=[1]), ValueError, "past_kv"),
        (lambda m, c: m(ids(3, 1), [pair(3)] * 2), ValueError, "past_kv"),
        (lambda m, c: m(ids(2, 1), [pair(3, heads=4)] * 2), ValueError, "past_kv"),
        (lambda m, c: m(ids(2, 1), [pair(3), pair(4)]), ValueError, "past_kv"),
        (lambda m, c: c(ids(), kv_cache=[]), TypeError, "kv_cache"),
        (lambda m, c: c.model.trf_blocks[0](torch.zeros(1, 3, 64), None), TypeError, "cos"),
        (lambda m, c: GroupQueryAttention(toys.config()), ValueError, "d_in"),
        (lambda m, c: c(ids(), past_kv=[]), TypeError, "past_kv"),
        (lambda m, c: c(), ValueError, "input_ids"),
        (lambda m, c: c(ids(), None, torch.ones(2, 39)), ValueError, "attention_mask"),
        (lambda m, c: c(ids(), None, ~hidden(40)[None, None]), ValueError, "mask"),
        (lambda m, c: c(ids(), None, torch.zeros(1, 1, 40, 39)), ValueError, "mask"),
        (lambda m, c: c(ids(), None, torch.ones(1, 1, 40, 40)), ValueError, "mask"),
        (lambda m, c: Llama3ForCausalLM(CFG), TypeError, "config"),
    ],
)
def test_calls_that_cannot_be(call, error, named):
    with pytest.raises(error, match=named):
        call(toys.by_dict(), toys.by_config())


# ---- embeddings and masks


def test_embeddings_are_taken_in_place_of_ids_and_not_scaled():
    model, causal, tokens = toys.by_dict(), toys.by_config(), ids()
    embeds = model.tok_emb(tokens)
    close(model.forward_with_embeds(embeds), model(tokens), 0)
    close(causal(tokens, embeds * 2)[0], causal(input_embeds=embeds * 2)[0], 0)
    inputs = []
    model.trf_blocks[0].norm1.register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(tokens)
    assert torch.equal(inputs[0], embeds)


def test_pooled_patches_before_a_text_in_16_bits():
    model, project = toys.by_dict(dtype=torch.bfloat16), nn.Linear(24, 64)
    pooled = nn.AdaptiveAvgPool1d(4)(torch.randn(2, 9, 24).mT).mT
    logits = model.forward_with_embeds(torch.cat([project(pooled), model.tok_emb(ids(2, 5))], 1))
    assert logits.shape == (2, 9, 99) and logits.dtype == torch.bfloat16
    logits.float().square().mean().backward()
    assert project.weight.grad.abs().max() > 0


@pytest.mark.parametrize("mask", [None, torch.ones(2, 40), torch.zeros(2, 1, 40, 40)])
def test_a_decoder_is_causal_without_being_told(mask):
    model, tokens = toys.by_config(), ids()
    other = tokens.clone()
    other[:, 30:] = (other[:, 30:] + 1) % 99
    first, second = (model(given, attention_mask=mask)[0][:, :30] for given in (tokens, other))
    close(first, second)


def test_padding():
    model, tokens, mask = toys.by_config(), ids(2, 12), torch.ones(2, 12)
    mask[0, :5] = 0
    padded = model(tokens, attention_mask=mask)[0]
    close(padded[:1, 5:], model(tokens[:1, 5:])[0])
    close(padded[1], model(tokens)[0][1])
    lowest = torch.finfo(torch.float32).min
    added = torch.zeros(2, 1, 1, 12).masked_fill(mask[:, None, None] == 0, lowest)
    positions = (mask.cumsum(-1) - 1).clamp(min=0).long()
    close(model(tokens, None, added, positions)[0][:, 5:], padded[:, 5:])


def test_masks_to_be_added_stay_causal():
    model, tokens, cache = toys.by_config(), ids(2, 12), KVCache()
    whole = model(tokens)[0]
    causal = torch.zeros(1, 1, 12, 12).masked_fill(hidden(12), -torch.inf)
    for mask in (causal, causal.clamp(min=-1e9), torch.zeros(1, 1, 12, 64)):  # longer than the keys
        close(model(tokens, attention_mask=mask)[0], whole)
    model(tokens[:, :8], attention_mask=torch.zeros(1, 1, 8, 8), kv_cache=cache)
    steps = model(tokens[:, 8:], attention_mask=torch.zeros(1, 1, 4, 12), kv_cache=cache)
    close(steps[0], whole[:, 8:])


def plain_attention(module, x, added):
    """The formula by hand; added: [..., T, T]."""
    q, k, v = (
        projection(x).unflatten(-1, (-1, 16)).transpose(1, 2)
        for projection in (module.W_query, module.W_key, module.W_value)
    )
    q, k, v = rope(q, *TABLES), *(y.repeat_interleave(2, 1) for y in (rope(k, *TABLES), v))
    weights = (q @ k.mT / 16**0.5 + added).softmax(-1)
    return module.out_proj((weights @ v).transpose(1, 2).flatten(2))


@pytest.mark.parametrize("kind", [bool, int, float])
def test_a_blocks_mask_may_be_causal(kind):
    module, x = attention(), torch.randn(2, 6, 64)
    added = torch.zeros(6, 6).masked_fill(hidden(6), -torch.inf)
    mask = {bool: hidden(6), int: hidden(6).long(), float: added}[kind]
    expected = plain_attention(module, x, added)
    for given in (mask, mask[None, None], None):
        close(module(x, *TABLES, given), expected)


def test_numbers_are_added_to_the_scaled_scores():
    module, x = attention(), torch.randn(2, 6, 64)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0])[:, None, None]
    added = -(torch.arange(6)[:, None] - torch.arange(6)).abs() * slopes
    added = added.masked_fill(hidden(6), -torch.inf)[None]
    close(module(x, *TABLES, added), plain_attention(module, x, added))
    causal, tokens = toys.by_config(), ids(2, 6)
    masked = causal(tokens, attention_mask=added)[0]
    assert not torch.allclose(masked, causal(tokens)[0])


def test_a_query_that_sees_nothing_gets_zeros():
    module, x, padded = attention(), torch.randn(2, 6, 64), torch.zeros(2, 1, 1, 6)
    padded[0, ..., :2] = -torch.inf
    out = module(x, *TABLES, padded)
    assert not out[0, :2].any()
    close(out[1], module(x, *TABLES)[1])


@pytest.mark.parametrize(
    ("mask", "error"),
    [
        (torch.ones(4, 6).bool(), ValueError),
        ([1], TypeError),
        (torch.ones(6, 6).tril(), ValueError),  # 1 where visible: the opposite
        (torch.zeros(6, 6), ValueError),  # hides nothing
        (torch.zeros(3, 1, 6, 6), ValueError),
        (torch.zeros(2, 3, 6, 6), ValueError),
        (hidden(6) | hidden(6).T.tril(-3), ValueError),  # a window
        (torch.full((6, 6), torch.nan), ValueError),
    ],
)
def test_masks_that_cannot_be(mask, error):
    with pytest.raises(error, match="mask"):
        attention()(torch.randn(2, 6, 64), *TABLES, mask)


# ---- parts


def test_attention_of_sizes():
    module = GroupQueryAttention(24, 48, num_heads=6, num_kv_groups=2, dtype=torch.bfloat16)
    assert (module.d_out, module.num_heads, module.num_kv_groups) == (48, 6, 2)
    assert (module.head_dim, module.group_size, module.W_query.bias) == (8, 3, None)
    assert module.W_key.weight.shape == (16, 24) and module.W_key.weight.dtype == torch.bfloat16
    x = torch.randn(2, 5, 24, dtype=torch.bfloat16)
    context, (k, v) = module(x, *compute_rope_params(8), hidden(5), None, True)
    assert context.shape == (2, 5, 48) and k.shape == v.shape == (2, 2, 5, 8)
    for sizes in ((64, 64, 5, 2), (64, 64, 4, 3), (64,)):
        with pytest.raises(ValueError, match="num_heads"):
            GroupQueryAttention(*sizes)


def test_blocks_called_by_a_script():
    model, causal, tokens = toys.by_dict(), toys.by_config(), ids()
    x = y = model.tok_emb(tokens)
    for block, same in zip(model.trf_blocks, causal.model.trf_blocks, strict=True):
        x = block(x, hidden(40), model.cos, model.sin)
        y = same(y, None, causal.model.cos, causal.model.sin)
    close(model.out_head(model.final_norm(x)), model(tokens))
    close(causal.lm_head(causal.model.final_norm(y)), causal(tokens)[0])


def test_a_block_returns_x_or_x_and_kv():
    block, x, (cos, sin) = TransformerBlock(CFG), torch.randn(2, 6, 64), TABLES
    whole, kv, steps = block(x, hidden(6), cos, sin), None, []
    for i in range(6):
        visible = torch.zeros(1, 1, dtype=torch.bool)
        step, kv = block(x[:, i : i + 1], visible, cos, sin, past_kv=kv, use_cache=True)
        steps.append(step)
    assert kv[0].shape == (2, 2, 6, 16)
    close(torch.cat(steps, 1), whole)
    _, kv = block(x[:, :3], hidden(3), cos, sin, None, True)
    close(block(x[:, 3:], hidden(3), cos, sin, kv), whole[:, 3:])  # a mask of the new tokens alone
    close(block(x[:, 3:], hidden(6)[3:], cos[3:6], sin[3:6], kv), whole[:, 3:])


def test_attention_and_feed_forward_have_shortcuts_of_their_own():
    block, x = TransformerBlock(toys.config()), torch.randn(2, 6, 64)
    between = x + block.att(block.norm1(x), *TABLES)
    close(block(x, None, *TABLES), between + block.ff(block.norm2(between)))


def test_feed_forward_and_norms():
    feed, norm, x = FeedForward(CFG), RMSNorm(64), torch.randn(2, 3, 64)
    assert feed.fc2.weight.shape == feed.fc1.weight.shape == (96, 64)
    close(feed(x), feed.fc3(nn.functional.silu(feed.fc1(x)) * feed.fc2(x)))
    norm.weight.data.normal_()
    close(norm(x), x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * norm.weight)
    close(norm(x, residual=x * 2), norm(x * 3))
    for model in (Llama3Model(CFG), Llama3ForCausalLM(toys.config())):
        assert {part.eps for part in model.modules() if isinstance(part, RMSNorm)} == {1e-5}


def test_tied_weights():
    model = Llama3ForCausalLM(toys.config())
    assert model.lm_head.weight is not model.model.tok_emb.weight and model.vocab_size == 99
    model.tie_weights()
    tied = Llama3ForCausalLM(toys.config(tie_word_embeddings=True))
    assert all(one.lm_head.weight is one.model.tok_emb.weight for one in (model, tied))


@pytest.mark.parametrize("names", [["W_query", "out_proj"], ["fc1", "fc2", "fc3"], ["out_head"]])
def test_lora_by_the_older_names(names):
    model = toys.by_dict()
    before = model(ids())
    convert_to_lora(model, names, 4, 8)
    close(model(ids()), before)
    model(ids()).square().mean().backward()
    trained = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert {name.split(".lora_")[0].rsplit(".")[-1] for name in trained} == set(names)


def test_frozen_weights_get_no_gradients():
    model = toys.by_dict()
    replace_linear_with_lora(model, rank=4, alpha=8)
    model(ids()).square().mean().backward()
    frozen = [layer.linear.weight for layer in model.modules() if isinstance(layer, Linear_LORA)]
    assert frozen and not any(weight.requires_grad for weight in frozen)
    trained = {id(p) for p in model.parameters() if p.grad is not None}
    assert trained == {id(p) for p in mllama.lora_parameters(model)}
