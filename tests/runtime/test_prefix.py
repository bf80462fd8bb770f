"""How much of a prompt a cache has."""

from types import SimpleNamespace

import pytest
import torch

from mllama.runtime.prefix import Reuse, find_reuse

IMAGE, PER = 9, 2
PIXELS = torch.arange(3.0).reshape(3, 1)


def spec(cross: tuple = (), token: int | None = IMAGE, both_ways: bool = False):
    return SimpleNamespace(
        bidirectional_prefix=both_ways,
        image_token_index=token,
        tokens_per_image=PER,
        text=SimpleNamespace(cross_attention_layers=cross),
    )


def images(*which: int) -> dict:
    return {"pixel_values": PIXELS[list(which)]} if which else {}


def reuse(cached: tuple, new: tuple, of=None, prefix: int = 0) -> Reuse:
    cache = SimpleNamespace(num_prefix_tokens=prefix)
    (ids, shown), (new_ids, new_shown) = cached, new
    return find_reuse(of or spec(), cache, ids, images(*shown), new_ids, images(*new_shown))


@pytest.mark.parametrize(
    ("cached", "new", "length"),
    [
        ([], [1, 2], 0),
        ([1, 2, 3], [1, 2, 3, 4], 3),
        ([1, 2, 3], [1, 2, 3], 2),  # the last id is computed always
        ([1, 2, 3, 4], [1, 2], 1),
        ([1, 2, 3], [1, 5, 3, 4], 1),
        ([1, 2, 3], [5, 2, 3], 0),
    ],
)
def test_text(cached, new, length):
    assert reuse((cached, ()), (new, ())) == Reuse(length)


ONE = [1, 9, 9, 2]
TWO = [1, 9, 9, 2, 9, 9, 3]


@pytest.mark.parametrize(
    ("cached", "new", "expected"),
    [
        ((ONE, (0,)), ([*ONE, 4, 5], (0,)), Reuse(4, 1)),
        ((ONE, (0,)), ([*ONE, 4, 5], (1,)), Reuse(1, 0)),
        ((ONE, (0,)), ([*ONE, 9, 9, 5], (0, 1)), Reuse(4, 1)),
        ((TWO, (0, 1)), ([*TWO, 5], (0, 1)), Reuse(7, 2)),
        ((TWO, (0, 1)), ([*TWO, 5], (0, 2)), Reuse(4, 1)),
        ((TWO, (0, 1)), ([*TWO, 5], (2, 1)), Reuse(1, 0)),
        ((TWO, (0, 1)), ([1, 9, 9, 2, 5], (0,)), Reuse(4, 1)),
        ((TWO, (0, 1)), ([1, 9, 9, 2, 9, 9], (0, 1)), Reuse(4, 1)),  # the second is cut in halves
        ((ONE, (0,)), ([*ONE, 4], ()), Reuse(1, 0)),
        (([1, 2], ()), ([1, 2, 9, 9, 5], (0,)), Reuse(2, 0)),
    ],
)
def test_images_at_placeholders(cached, new, expected):
    assert reuse(cached, new) == expected


def test_images_beside_the_text_are_reused_whole_or_not_at_all():
    for of, prefix in ((spec(cross=(1,)), 0), (spec(token=None), 4)):
        known = {"of": of, "prefix": prefix}
        assert reuse(([1, 2], (0, 1)), ([1, 2, 3], (0, 1)), **known) == Reuse(2, 2)
        assert reuse(([1, 2], (0, 1)), ([5, 2, 3], (0, 1)), **known) == Reuse()
        assert reuse(([1, 2], (0, 1)), ([1, 2, 3], (0,)), **known) == Reuse()
        assert reuse(([1, 2], (0,)), ([1, 2, 3], ()), **known) == Reuse()


def test_what_cannot_be_told_is_computed_anew():
    assert reuse((ONE, (0,)), ([*ONE, 4], (0,)), of=spec(token=None)) == Reuse()
    assert reuse(([1, 2], ()), ([1, 2, 3], ()), of=spec(both_ways=True)) == Reuse()
