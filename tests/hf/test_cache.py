"""Places of cross-attention layers in caches of transformers."""

import pytest
import torch
from transformers import Cache, DynamicCache, EncoderDecoderCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer, StaticSlidingWindowLayer

import twins
from mllama.hf.cache import CrossCacheLayer, check_cache, place_cross_layers
from mllama.hf.configs import MllamaTextConfig

CONFIG = MllamaTextConfig(**twins.TEXT | {"num_hidden_layers": 3}, cross_attention_layers=[1])


def states(keys: int, rows: int = 2) -> torch.Tensor:
    return torch.randn(rows, 2, keys, 16)


@pytest.mark.parametrize(
    "make",
    [
        DynamicCache,
        lambda: DynamicCache(config=CONFIG),
        lambda: StaticCache(CONFIG, max_cache_len=8),
    ],
)
def test_pictures_stay_while_text_comes_and_goes(make):
    cache = make()
    assert place_cross_layers(cache, [1], 3).get_seq_length() == 0
    keys, more, none = states(20), states(5), states(0)
    cache.update(states(3), states(3), 0)
    assert torch.equal(cache.update(keys, keys, 1)[0], keys)
    assert cache.update(none, none, 1)[1] is keys  # nothing is copied for a token
    place = cache.layers[1]
    place.kept = torch.tensor([True, False])
    assert place_cross_layers(cache, [1], 3) is place and place.get_seq_length() == 20
    if isinstance(cache, DynamicCache):
        cache.crop(-2)
        assert cache.get_seq_length() == 1
    assert torch.equal(cache.update(more, more, 1)[0], torch.cat([keys, more], 2))
    cache.reorder_cache(torch.tensor([1, 0]))
    assert torch.equal(place.keys[0, :, :20], keys[1])
    cache.reset()
    assert place_cross_layers(cache, [1], 3).get_seq_length() == 0 and place.kept is None


def test_empty_places_take_part_in_everything():
    cache = DynamicCache()
    place_cross_layers(cache, [1], 3)
    cache.update(states(3), states(3), 0)
    cache.crop(-1)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([0, 3]))
    cache.reorder_cache(torch.tensor([1, 1]))
    assert isinstance(cache.layers[1], CrossCacheLayer) and cache.get_seq_length() == 2


def test_caches_of_other_models_are_refused():
    cache = DynamicCache()
    cache.update(states(3), states(3), 1)
    with pytest.raises(ValueError, match="another model at layer 1"):
        place_cross_layers(cache, [1], 3)
    with pytest.raises(ValueError, match="must have 3 layers"):
        place_cross_layers(
            StaticCache(MllamaTextConfig(**twins.TEXT | {"num_hidden_layers": 1}), max_cache_len=8),
            [1],
            3,
        )


@pytest.mark.parametrize(
    "make",
    [lambda text: DynamicCache(config=text), lambda text: StaticCache(text, max_cache_len=8)],
)
def test_a_cache_of_the_layers_of_text_gets_places_for_the_others(make):
    cache = make(MllamaTextConfig(**twins.TEXT))
    text = list(cache.layers)
    first = place_cross_layers(cache, [1, 3], 4)
    assert (
        cache.layers[::2] == text
        and cache.layers[1] is first
        and isinstance(cache.layers[3], CrossCacheLayer)
    )
    assert place_cross_layers(cache, [1, 3], 4) is first and len(cache.layers) == 4


@pytest.mark.parametrize(
    ("cache", "error", "match"),
    [
        (((torch.zeros(1),) * 2,), TypeError, "got tuple"),
        (EncoderDecoderCache(DynamicCache(), DynamicCache()), TypeError, "got EncoderDecoderCache"),
        (
            Cache(layers=[DynamicSlidingWindowLayer(sliding_window=4)]),
            ValueError,
            "got a DynamicSlidingWindowLayer at 0",
        ),
        (
            Cache(layers=[StaticSlidingWindowLayer(max_cache_len=8, sliding_window=4)]),
            ValueError,
            "must keep all tokens",
        ),
    ],
)
def test_caches_of_other_kinds_are_refused(cache, error, match):
    with pytest.raises(error, match=match):
        check_cache(cache)
