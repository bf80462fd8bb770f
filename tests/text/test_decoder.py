"""The decoder by itself: positions, masks and caches."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, StaticCache

import tiny
from mllama.config.spec import LayerSpec, RopeSpec, TextSpec, uniform_layers
from mllama.hf.cache import TransformersCache
from mllama.nn.rope import RotaryEmbedding
from mllama.text.decoder import Decoder


@pytest.fixture(scope="module")
def decoder():
    return tiny.model().language_model


def run(decoder, ids, **options) -> torch.Tensor:
    with torch.no_grad():
        return decoder(torch.tensor(ids), **options).last_hidden_state


def test_positions_are_counted_from_the_mask(decoder):
    """Rotary positions are relative, so a shift of a whole row would not show; a gap within it
    does.
    """
    mask = torch.tensor([[0, 1, 1, 0, 1]])
    ids = [[7, 1, 2, 7, 3]]
    counted = run(decoder, ids, attention_mask=mask)
    given = run(decoder, ids, attention_mask=mask, position_ids=torch.tensor([[0, 0, 1, 1, 2]]))
    assert torch.equal(counted, given)
    torch.testing.assert_close(
        counted[:, mask[0] == 1], run(decoder, [[1, 2, 3]]), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", [torch.bool, torch.long, torch.float32, torch.bfloat16])
def test_masks_of_any_dtype(decoder, kind):
    mask = torch.tensor([[0, 1, 1, 1]])
    assert torch.equal(
        run(decoder, [[1, 2, 3, 4]], attention_mask=mask.to(kind)),
        run(decoder, [[1, 2, 3, 4]], attention_mask=mask),
    )


def test_a_static_cache_hides_its_unfilled_slots(decoder):
    mask = torch.tensor([[0, 1, 1, 1, 1, 1]])
    whole = run(decoder, [[7, 1, 2, 3, 4, 5]], attention_mask=mask)
    static = StaticCache(tiny.model().config.text_config, max_cache_len=10)
    cache = TransformersCache(static, decoder.config)
    first = run(decoder, [[7, 1, 2, 3]], attention_mask=mask[:, :4], cache=cache)
    rest = run(decoder, [[4, 5]], attention_mask=mask, cache=cache)
    torch.testing.assert_close(
        torch.cat([first, rest], dim=1)[:, 1:], whole[:, 1:], rtol=1e-4, atol=1e-4
    )


def test_ids_or_embeddings(decoder):
    with pytest.raises(ValueError, match="exactly one"):
        decoder()
    with pytest.raises(ValueError, match="2 cached and 1 new"):
        cache = TransformersCache(DynamicCache(), decoder.config)
        run(decoder, [[1, 2]], cache=cache)
        run(decoder, [[3]], cache=cache, attention_mask=torch.ones(1, 2))


def test_hooks_see_every_module_and_another_norm_takes_a_norms_place():
    decoder, ids = tiny.model().language_model, [[1, 2, 3]]
    plain, seen = run(decoder, ids), set()
    for name, module in decoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.add(name))
    torch.testing.assert_close(run(decoder, ids), plain)
    assert {name for name, _ in decoder.named_modules()} - seen == {"layers", "rotary"}

    for layer in decoder.layers:
        norm = torch.nn.RMSNorm(64, layer.post_attention_layernorm.eps)
        norm.weight = layer.post_attention_layernorm.weight
        layer.post_attention_layernorm = norm
    torch.testing.assert_close(run(decoder, ids), plain)


def test_positions_that_restart_begin_sequences(decoder):
    """By positions, or where the caller says so."""
    alone = torch.cat([run(decoder, [[1, 2, 3]]), run(decoder, [[4, 5]])], dim=1)
    place = torch.tensor([[0, 1, 2, 0, 1]])
    torch.testing.assert_close(
        run(decoder, [[1, 2, 3, 4, 5]], position_ids=place), alone, rtol=1e-4, atol=1e-4
    )
    given = run(decoder, [[1, 2, 3, 4, 5]], first_key=torch.tensor([[0, 0, 0, 3, 3]]))
    torch.testing.assert_close(given, alone, rtol=1e-4, atol=1e-4)
    mask = torch.ones(1, 1, 5, 5, dtype=torch.bool).tril()
    for name, value in (("first_key", place), ("prefix_length", torch.tensor([2]))):
        with pytest.raises(ValueError, match=name):
            run(decoder, [[1, 2, 3, 4, 5]], attention_mask=mask, **{name: value})


ROPES = (RopeSpec(100.0), RopeSpec(5000.0, "linear", factor=4.0))


def spec(*layers: LayerSpec, **options) -> TextSpec:
    sizes = {name: tiny.TEXT[name] for name in ("vocab_size", "hidden_size", "intermediate_size")}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
    return TextSpec(**sizes, **heads, layers=layers, **options)


def made(*layers: LayerSpec, **options) -> Decoder:
    return tiny.randomize(Decoder(spec(*layers, **options))).eval()


def test_every_layer_has_its_own_rope_and_each_is_made_once():
    local, far = (LayerSpec(rope=rope) for rope in ROPES)
    decoder = made(local, far, local)
    assert len(decoder.rotary) == 2 and decoder.rope_of_layer == [0, 1, 0]
    ids = torch.tensor([[1, 2, 3, 4, 5, 6]])
    x = decoder.embed_tokens(ids)
    for layer, rope in zip(decoder.layers, (*ROPES, ROPES[0]), strict=True):
        parameters = {"rope_theta": rope.rope_theta, "rope_type": rope.rope_type, "factor": 4.0}
        tables = RotaryEmbedding(16, parameters)(torch.arange(6)[None])
        x, _ = layer(x, tables)
    torch.testing.assert_close(decoder(ids).last_hidden_state, decoder.norm(x))


@pytest.mark.parametrize("window", [1, 3])
def test_a_window_bounds_what_a_position_depends_on(window):
    """Two layers see twice as far; a layer that sees all makes it all."""
    narrow, wide = LayerSpec(window=window), LayerSpec()
    for layers, reach in (((narrow,), window), ((narrow, narrow), 2 * window - 1), ((wide,), 9)):
        decoder = made(*layers)
        embeds = torch.randn(1, 9, 64, requires_grad=True)
        last = decoder(inputs_embeds=embeds).last_hidden_state[0, -1]
        (gradient,) = torch.autograd.grad(last.square().sum(), embeds)
        assert gradient[0].any(-1).tolist() == [False] * (9 - reach) + [True] * reach


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_windows_and_caches(kind):
    """Cached pieces, and padding on the left, give what the whole gives."""
    layers = (LayerSpec(window=3, post_norms=True), LayerSpec(rope=ROPES[1], qk_norm=True))
    decoder, config = made(*layers), LlamaConfig(**tiny.TEXT)
    whole = run(decoder, [[1, 2, 3, 4, 5, 6, 7]])
    mask = torch.tensor([[0] + [1] * 7])
    raw = kind() if kind is DynamicCache else kind(config, max_cache_len=12)
    cache, pieces = TransformersCache(raw, decoder.config), []
    for ids, end in (([7, 1, 2, 3, 4], 5), ([5], 6), ([6, 7], 8)):
        pieces.append(run(decoder, [ids], attention_mask=mask[:, :end], cache=cache))
    got = torch.cat(pieces, 1)[:, 1:]
    torch.testing.assert_close(got, whole, rtol=1e-4, atol=1e-4)


def test_norms_before_and_after():
    layer = made(LayerSpec(post_norms=True), norm_offset=1.0).layers[0]
    x, tables = torch.randn(2, 5, 64), RotaryEmbedding(16, {})(torch.arange(5)[None])
    inner = layer.self_attn(layer.input_layernorm(x), tables)[0]
    middle = x + layer.post_attention_layernorm(inner)
    fed = layer.mlp(layer.pre_feedforward_layernorm(middle))
    expected = middle + layer.post_feedforward_layernorm(fed)
    torch.testing.assert_close(layer(x, tables)[0], expected)


def test_layers_that_attend_to_images_are_made_by_the_caller():
    def cross_layer(config, index):
        return torch.nn.Identity(index)

    decoder = Decoder(spec(*uniform_layers(3, {}, [1])), cross_layer)
    assert isinstance(decoder.layers[1], torch.nn.Identity)
    assert decoder.config.cross_attention_layers == (1,) and decoder.config.num_hidden_layers == 3
