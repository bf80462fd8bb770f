"""The decoder by itself: positions, masks and caches."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

import twins
from mllama.hf.cache import TransformersCache


@pytest.fixture(scope="module")
def decoder():
    return twins.model().language_model


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
    static = StaticCache(twins.model().config.text_config, max_cache_len=10)
    cache = TransformersCache(static, decoder.config)
    first = run(decoder, [[7, 1, 2, 3]], attention_mask=mask[:, :4], cache=cache)
    rest = run(decoder, [[4, 5]], attention_mask=mask, cache=cache)
    torch.testing.assert_close(
        torch.cat([first, rest], dim=1)[:, 1:], whole[:, 1:], rtol=1e-4, atol=1e-4
    )


def test_ids_or_embeddings(decoder):
    with pytest.raises(ValueError, match="exactly one"):
        decoder()
    with pytest.raises(ValueError, match="2 cached and 1 new tokens, got 2"):
        cache = TransformersCache(DynamicCache(), decoder.config)
        run(decoder, [[1, 2]], cache=cache)
        run(decoder, [[3]], cache=cache, attention_mask=torch.ones(1, 2))


def test_hooks_see_every_module_and_another_norm_takes_a_norms_place():
    decoder, ids = twins.model().language_model, [[1, 2, 3]]
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
