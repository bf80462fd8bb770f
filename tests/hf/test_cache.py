"""Caches of transformers as the decoder sees them, with places for cross-attention layers."""

import pytest
import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, Gemma2Config, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

import tiny
from mllama.config.spec import LayerSpec, TextSpec, uniform_layers
from mllama.hf.cache import CrossCacheLayer, TransformersCache
from mllama.hf.configs import MllamaTextConfig


def config(layers: int, cross: list[int] | None = None) -> MllamaTextConfig:
    sizes = tiny.TEXT | {"num_hidden_layers": layers}
    return MllamaTextConfig(**sizes, cross_attention_layers=cross)


def spec(layers: int, cross: list[int]) -> TextSpec:
    return TextSpec.of(config(layers, cross), layers=uniform_layers(layers, {}, cross))


CONFIG, SPEC = config(3, [1]), spec(3, [1])


def states(keys: int, rows: int = 2) -> torch.Tensor:
    """[B, keys, KV, D]."""
    return torch.randn(rows, keys, 2, 16)


@pytest.mark.parametrize("make", [DynamicCache, lambda: StaticCache(CONFIG, max_cache_len=8)])
def test_keys_come_back_in_the_order_that_the_decoder_has_them(make):
    cache = TransformersCache(make(), SPEC)
    static = isinstance(cache.cache, StaticCache)
    k, v = states(3), states(3)
    assert int(cache.length) == 0 and cache.num_keys(3) == (8 if static else 3)
    before = cache.length
    for got, given in zip(cache.update(0, k, v), (k, v), strict=True):
        assert torch.equal(got[:, :3], given) and got.shape[1] == (8 if static else 3)
    assert int(before) == 0 and int(cache.length) == 3  # a copy: the static one's is a tensor
    assert isinstance(cache.length, torch.Tensor) == static
    assert cache.num_keys(2) == (8 if static else 5)


@pytest.mark.parametrize(
    "make",
    [
        DynamicCache,
        lambda: DynamicCache(config=CONFIG),
        lambda: StaticCache(CONFIG, max_cache_len=8),
    ],
)
def test_images_stay_while_text_comes_and_goes(make):
    raw = make()
    cache = TransformersCache(raw, SPEC)
    keys, more, none = states(20), states(5), states(0)
    cache.update(0, states(3), states(3))
    assert torch.equal(cache.update_cross(1, keys, keys)[0], keys)
    place = raw.layers[1]
    held = place.keys
    cache.update_cross(1, none, none)
    assert place.keys is held  # nothing is copied for a token
    cache.tile_mask, cache.num_prefix_tokens = torch.tensor([True, False]), 2
    again = TransformersCache(raw, SPEC)
    assert again.tile_mask.tolist() == [True, False] and again.num_prefix_tokens == 2
    assert raw.layers[1] is place and place.get_seq_length() == 20
    if isinstance(raw, DynamicCache):
        raw.crop(-2)
        assert again.length == 1
    assert torch.equal(again.update_cross(1, more, more)[0], torch.cat([keys, more], 1))
    raw.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(place.keys[0, :, :20], keys[1].transpose(0, 1))
    raw.reset()
    assert place.get_seq_length() == 0 and TransformersCache(raw, SPEC).tile_mask is None


def test_empty_places_take_part_in_everything():
    raw = DynamicCache()
    TransformersCache(raw, SPEC).update(0, states(3), states(3))
    raw.crop(-1)
    raw.batch_repeat_interleave(2)
    raw.batch_select_indices(torch.tensor([0, 3]))
    raw.reorder_cache(torch.tensor([1, 1]))
    assert isinstance(raw.layers[1], CrossCacheLayer) and raw.get_seq_length() == 2


@pytest.mark.parametrize(
    "make",
    [lambda text: DynamicCache(config=text), lambda text: StaticCache(text, max_cache_len=8)],
)
def test_a_cache_of_the_layers_of_text_gets_places_for_the_others(make):
    raw = make(MllamaTextConfig(**tiny.TEXT))
    text = list(raw.layers)
    TransformersCache(raw, spec(4, [1, 3]))
    assert raw.layers[::2] == text
    assert all(isinstance(layer, CrossCacheLayer) for layer in raw.layers[1::2])
    places = list(raw.layers)
    TransformersCache(raw, spec(4, [1, 3]))
    assert raw.layers == places


def windowed(*windows: int | None) -> tuple[Gemma2Config, TextSpec]:
    """A Gemma 2's config, and the spec of a decoder with such windows."""
    kinds = ["sliding_attention" if window else "full_attention" for window in windows]
    sizes = tiny.SIZES | {"num_hidden_layers": len(windows), "head_dim": 16}
    config = Gemma2Config(**sizes, layer_types=kinds, sliding_window=max(filter(None, windows)))
    layers = tuple(LayerSpec(window=window) for window in windows)
    return config, TextSpec.of(SPEC, layers=layers)


@pytest.mark.parametrize(
    "make", [lambda config: DynamicCache(config=config), lambda config: StaticCache(config, 10)]
)
def test_layers_with_the_decoders_window_keep_all_tokens(make):
    config, text = windowed(4, None)
    raw = make(config)
    assert raw.layers[0].is_sliding
    cache = TransformersCache(raw, text)
    keys = states(7)
    cache.update(0, keys[:, :5], keys[:, :5])
    again = TransformersCache(raw, text)
    assert int(again.length) == 5
    k, _ = again.update(0, keys[:, 5:], keys[:, 5:])
    assert torch.equal(k[:, :7], keys) and k.shape[1] == again.num_keys(0)


@pytest.mark.parametrize(
    ("windows", "make"),
    [
        ((5, None), lambda config: DynamicCache(config=config)),
        ((None, None), lambda config: DynamicCache(config=config)),
        ((3, None), lambda config: StaticCache(config, 10)),
        ((4, 4), lambda config: StaticCache(windowed(4, 4)[0], 10)),  # its size is not known
    ],
)
def test_other_windows_are_refused(windows, make):
    text = TextSpec.of(SPEC, layers=tuple(LayerSpec(window=window) for window in windows))
    with pytest.raises(ValueError, match="all tokens"):
        TransformersCache(make(windowed(4, None)[0]), text)


def test_a_sliding_layer_that_was_written_to_is_refused():
    config, text = windowed(4, None)
    raw = DynamicCache(config=config)
    raw.update(*[states(3).transpose(1, 2)] * 2, 0)
    with pytest.raises(ValueError, match="all tokens"):
        TransformersCache(raw, text)


def written_elsewhere() -> Cache:
    cache = DynamicCache()
    cache.update(*[states(3).transpose(1, 2)] * 2, 1)
    return cache


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: ((torch.zeros(1),) * 2,), TypeError, "tuple"),
        (
            lambda: EncoderDecoderCache(DynamicCache(), DynamicCache()),
            TypeError,
            "EncoderDecoderCache",
        ),
        (
            lambda: Cache(layers=[DynamicSlidingWindowLayer(sliding_window=4)]),
            ValueError,
            "DynamicSlidingWindowLayer at 0",
        ),
        (
            lambda: Cache(layers=[StaticSlidingWindowLayer(max_cache_len=8, sliding_window=4)]),
            ValueError,
            "all tokens",
        ),
        (written_elsewhere, ValueError, "layer 1"),
        (lambda: StaticCache(config(1), max_cache_len=8), ValueError, "3 layers"),
    ],
)
def test_other_caches_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        TransformersCache(make(), SPEC)
