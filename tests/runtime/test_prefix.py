"""How much of a prompt a cache has."""

from types import SimpleNamespace

import pytest
import torch

from mllama.runtime.prefix import Prompt, Reuse, find_reuse

IMAGE, PER = 9, 2


def spec(cross: tuple = (), token: int | None = IMAGE, both_ways: bool = False):
    return SimpleNamespace(
        bidirectional_prefix=both_ways,
        image_token_index=token,
        tokens_per_image=PER,
        text=SimpleNamespace(cross_attention_layers=cross),
    )


def prompt(ids: list, images: tuple = (), mask: list | None = None) -> Prompt:
    """`mask`: the images that each position sees, all of one tile."""
    seen = None if mask is None else torch.tensor(mask)[None, :, :, None]
    return Prompt(ids, [bytes([image]) for image in images], seen)


def reuse(cached: tuple, new: tuple, of=None, prefix: int = 0, reference: str = "meta") -> Reuse:
    return find_reuse(of or spec(), prompt(*cached), prompt(*new), prefix, reference)


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
        (([1, 2], ()), ([1, 2, 9, 9, 5], (0,)), Reuse(2, 0)),
    ],
)
def test_images_at_placeholders(cached, new, expected):
    assert reuse(cached, new) == expected


def test_images_before_the_text_are_reused_whole_or_not_at_all():
    known = {"of": spec(token=None), "prefix": 4}
    assert reuse(([1, 2], (0, 1)), ([1, 2, 3], (0, 1)), **known) == Reuse(2, 2)
    assert reuse(([1, 2], (0, 1)), ([5, 2, 3], (0, 1)), **known) == Reuse(0, 2)
    assert reuse(([1, 2], (0, 1)), ([1, 2, 3], (0,)), **known) == Reuse()
    assert reuse(([1, 2], (0,)), ([1, 2, 3], ()), **known) == Reuse()
    assert reuse(([1, 2], (0,)), ([1, 2, 9, 9], (0,)), prefix=2) == Reuse()  # now in the text


def test_images_that_all_positions_attend_to_are_the_same_or_nothing_is_reused():
    known = {"of": spec(cross=(1,), token=None)}
    assert reuse(([1, 2], (0, 1)), ([1, 2, 3], (0, 1)), **known) == Reuse(2, 2)
    assert reuse(([1, 2], (0, 1)), ([5, 2, 3], (0, 1)), **known) == Reuse(0, 2)
    assert reuse(([1, 2], (0, 1)), ([1, 2, 3], (0,)), **known) == Reuse()
    assert reuse(([1, 2], (0,)), ([1, 2, 3], (0, 1)), **known) == Reuse()
    assert reuse(([1, 2], ()), ([1, 2, 3], (0,)), **known) == Reuse()


NONE, FIRST, BOTH = [0, 0], [1, 0], [1, 1]


@pytest.mark.parametrize(
    ("before", "now", "meta", "hf"),
    [
        (((0,), [[1], [1]]), ((0, 1), [FIRST, FIRST, BOTH]), 2, 2),
        (((0,), [[0], [1]]), ((0, 1), [NONE, FIRST, BOTH]), 2, 0),  # the first sees all, with "hf"
        (((0,), [[1], [1]]), ((0, 1), [FIRST, BOTH, BOTH]), 0, 0),
        (((0,), [[1], [1]]), ((0, 1), [FIRST, NONE, BOTH]), 0, 0),
        (((0,), [[1], [1]]), ((1, 0), [FIRST, FIRST, BOTH]), 0, 0),
        (((0,), [[0], [1]]), ((0,), [[0], [1], [1]]), 2, 2),
        (((0,), [[0], [1]]), ((0,), [[0], [1]]), 2, 2),  # the last row holds for what follows
        (((0,), [[1], [1]]), ((0,), None), 0, 0),
        (((), None), ((0,), [[0], [0], [1]]), 2, 0),
        (((), None), ((0,), [[0], [1], [1]]), 0, 0),
    ],
)
def test_a_further_image_that_earlier_positions_do_not_see(before, now, meta, hf):
    for reference, length in (("meta", meta), ("hf", hf)):
        known = {"of": spec(cross=(1,)), "reference": reference}
        assert reuse(([1, 2], *before), ([1, 2, 3], *now), **known).length == length


def test_what_cannot_be_told_is_computed_anew():
    assert reuse((ONE, (0,)), ([*ONE, 4], (0,)), of=spec(token=None)) == Reuse()
    assert reuse((ONE, (0,)), ([*ONE, 4], (0, 1))) == Reuse()  # an image without a place
    assert reuse((ONE, (0,)), ([*ONE, 4], ())) == Reuse()
    assert reuse(([1, 2], ()), ([1, 2, 3], ()), of=spec(both_ways=True)) == Reuse()
